"""cxrbatch: a batch service for chest X-rays. Start reading in `pipeline.py`."""

import os

__version__ = "0.1.0"

# numpy's OpenBLAS takes a thread a core for the smallest product, and they spin while they wait for one another: ten
# times the CPU, taken from the networks and decoders. Read when numpy is first imported, which is after this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
