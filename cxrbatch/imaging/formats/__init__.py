"""Recognise file formats and read their samples; DICOM has its own package."""
