"""cxrbatch: a batch service for chest X-rays. Start reading in `pipeline/__init__.py`."""

import os

__version__ = "0.2.0"

# By default numpy's OpenBLAS starts one thread per core even for the smallest product; they spin while they wait and
# take CPU from the networks and decoders. OpenBLAS reads this when numpy is first imported, which is after this line.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
