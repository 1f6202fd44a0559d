"""Named places where a test may kill the process. Without CXRBATCH_FAILPOINT they cost one comparison.

CXRBATCH_FAILPOINT="record.committed:3" kills the process with SIGKILL when it reaches this point for the third time:
no handler runs and no buffer is flushed, as after a power failure. tests/crash tries all of them.
"""

from __future__ import annotations

import os
import signal

__all__ = ["failpoint"]

_POINT, _, _OCCURRENCE = os.environ.get("CXRBATCH_FAILPOINT", "").partition(":")
_seen = 0


def failpoint(name: str) -> None:
    """Kill this process here if CXRBATCH_FAILPOINT says so."""
    global _seen
    if name == _POINT:
        _seen += 1
        if _seen == int(_OCCURRENCE or 1):
            os.kill(os.getpid(), signal.SIGKILL)
