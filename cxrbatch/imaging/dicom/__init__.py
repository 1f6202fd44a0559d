"""Reading DICOM: `read` parses, `frames` decodes, `identity` reads the text columns, `image` combines them."""
