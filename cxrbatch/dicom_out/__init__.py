"""Results as DICOM objects: a Secondary Capture that people see anywhere, and a structured report for programs.

`objects.py` opens the source again and makes both; `send.py` takes them to a PACS. Needs the extra `dicom`.
"""
