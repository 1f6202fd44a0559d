"""From folders and DICOM senders to complete files: discovery, stability, watching, receiving."""
