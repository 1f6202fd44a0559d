"""Named places where a test may kill or freeze the process. Without CXRBATCH_FAILPOINT they cost one comparison.

CXRBATCH_FAILPOINT="record.committed:3" kills the process with SIGKILL when it reaches this point for the third time:
no handler runs and no buffer is flushed, as after a power failure. tests/crash tries all of them.
"record.committed:3:SIGSTOP" freezes it there, as a suspended machine does.
"""

from __future__ import annotations

import os
import signal

__all__ = ["failpoint"]

_POINT, _OCCURRENCE, _SIGNAL, *_ = [*os.environ.get("CXRBATCH_FAILPOINT", "").split(":"), "", ""]
_seen = 0


def failpoint(name: str) -> None:
    """Kill or freeze this process here if CXRBATCH_FAILPOINT says so."""
    global _seen
    if name == _POINT:
        _seen += 1
        if _seen == int(_OCCURRENCE or 1):
            os.kill(os.getpid(), signal.Signals[_SIGNAL or "SIGKILL"])
