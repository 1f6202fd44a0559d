"""Reading DICOM: `read` parses, `frames` decodes, `identity` names, `picture` puts them together."""
