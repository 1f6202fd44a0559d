"""What each file format is and how its samples are read; DICOM has a package of its own."""
