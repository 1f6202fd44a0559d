"""cxrbatch: a batch service for chest X-rays. Start reading in `pipeline.py`."""

__version__ = "0.1.0"
