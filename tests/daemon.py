"""The real daemon with an engine of plain arithmetic: it starts in a second, so that it can be killed a thousand times.

Everything else is the product: command line, ledger, decode processes, road, store. Run as a script, it is `cxrbatch`.
Faults come by the environment: CXRBATCH_CRASH_AT (cxrbatch/crash.py) and TEST_FAULT (faults.py).
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

# Nothing of cxrbatch up here: a decode process imports this file too, and would load what only the daemon needs.


class Arithmetic:
    """Logits from a few sums over the plane: the same plane gives the same numbers, another one gives others."""

    name, version, device, batch_size = "arithmetic", "1", "cpu", 8

    def load(self, stage: Any) -> Any:
        import numpy as np

        classes = len(stage.classes)
        slow_s = float(os.environ.get("TEST_SLOW_S", "0"))

        def network(planes: Any) -> tuple[Any, Any]:
            time.sleep(slow_s)
            parts = planes.reshape(len(planes), -1).astype(np.float64)
            sums = np.stack([parts[:, k::classes].mean(1) / 64 + 1 for k in range(classes)], 1)
            return sums.astype(np.float32), sums.astype(np.float32)

        return network


def main() -> None:
    """`cxrbatch` with what the environment asks for."""
    import importlib

    import cxrbatch.crash
    import cxrbatch.ops.watch
    from cxrbatch import cli

    importlib.reload(cxrbatch.crash)  # in the nursery, it was read before this life's environment was there
    _break()
    cxrbatch.ops.watch.open_engine = lambda *_: Arithmetic()  # type: ignore[assignment]
    sys.argv[0] = "cxrbatch"
    cli.main()


def _break() -> None:
    if "TEST_FAULT" in os.environ or "TEST_FAULT_FILE" in os.environ:
        import faults

        faults.install()


def _wait() -> None:
    """For requests, with all that a life needs imported."""
    import cxrbatch.ops.receive
    import cxrbatch.ops.watch
    import cxrbatch.store.export  # noqa: F401
    import faults  # noqa: F401
    import nursery
    from cxrbatch import cli  # noqa: F401

    nursery.serve(main)


def _clock() -> None:
    """Write down how long each file takes: wall and CPU seconds, and its name."""
    if "TEST_TIMES" not in os.environ:
        return
    from cxrbatch import decode

    real = decode.decode_file
    out = os.open(os.environ["TEST_TIMES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def timed(path: str, *args: Any) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        try:
            return real(path, *args)
        finally:
            line = f"{time.monotonic() - wall:.6f} {time.process_time() - cpu:.6f} {os.path.basename(path)}\n"
            os.write(out, line.encode())

    decode.decode_file = timed


if __name__ == "__mp_main__":  # a decode process
    _break()
    _clock()
if __name__ == "__main__":
    _wait() if sys.argv[1:] == ["--nursery"] else main()
