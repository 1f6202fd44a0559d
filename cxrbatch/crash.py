"""Named places where a test may pull the plug. Without CXRBATCH_CRASH_AT they cost one comparison.

CXRBATCH_CRASH_AT="record.committed:3" ends the process that comes to this point for the third time with SIGKILL:
no handler runs, no buffer is flushed, as when the power goes. tests/crash walks through all of them.
"""

from __future__ import annotations

import os
import signal

__all__ = ["crash_point"]

_POINT, _, _OCCURRENCE = os.environ.get("CXRBATCH_CRASH_AT", "").partition(":")
_seen = 0


def crash_point(name: str) -> None:
    """Die here and now if the environment says so."""
    global _seen
    if name == _POINT:
        _seen += 1
        if _seen == int(_OCCURRENCE or 1):
            os.kill(os.getpid(), signal.SIGKILL)
