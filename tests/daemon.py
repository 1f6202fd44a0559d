"""The real daemon with an engine of plain arithmetic: it starts in a second, so that it can be killed a thousand times.

Everything else is the product: command line, job queue, decode processes, pipeline, store. Run as a script, it is
`cxrbatch`, and its daemon has that engine with TEST_ENGINE=arithmetic.
Faults come by the environment: CXRBATCH_FAILPOINT (cxrbatch/failpoints.py) and TEST_FAULT (faults.py).
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

# No import of cxrbatch here: decode processes import this file too, and would load what only the daemon needs.


class Arithmetic:
    """Logits from a few sums over the model input: equal inputs give equal numbers, other inputs other numbers."""

    name, version, device, batch_size = "arithmetic", "1", "cpu", 8

    def load(self, stage: Any) -> Any:
        import numpy as np

        classes = len(stage.classes)
        slow_s = float(os.environ.get("TEST_SLOW_S", "0"))

        def network(model_inputs: Any) -> tuple[Any, Any]:
            time.sleep(slow_s)
            if "TEST_LOST_GPU" in os.environ:
                from cxrbatch.errors import Fatal

                raise Fatal("The GPU no longer answers.")  # as engines/torch_engine.py does
            parts = model_inputs.reshape(len(model_inputs), -1).astype(np.float64)
            sums = np.stack([parts[:, k::classes].mean(1) / 64 + 1 for k in range(classes)], 1)
            return sums.astype(np.float32), sums.astype(np.float32)

        return network


def main() -> None:
    """`cxrbatch` with what the environment asks for."""
    import importlib

    import cxrbatch.failpoints
    import cxrbatch.ops.watch
    import cxrbatch.store.connection
    from cxrbatch import cli

    importlib.reload(cxrbatch.failpoints)  # the fork server read it before this process's environment was set
    if "TEST_FROZEN_S" in os.environ:
        cxrbatch.store.connection._FROZEN_S = int(os.environ["TEST_FROZEN_S"])
        # Another thread may be sending rows when the process is frozen: only this limit ends that, else after 300 s.
        cxrbatch.store.connection._LONGEST_S = 4 * cxrbatch.store.connection._FROZEN_S
    _break()
    if os.environ.get("TEST_ENGINE") == "arithmetic":
        cxrbatch.ops.watch.open_engine = lambda *_: Arithmetic()  # type: ignore[assignment]
    sys.argv[0] = "cxrbatch"
    cli.main()


def _break() -> None:
    if "TEST_FAULT" in os.environ or "TEST_FAULT_FILE" in os.environ:
        import faults

        faults.install()


def _wait() -> None:
    """Serve requests, with everything imported that a command needs; not the engines, which start threads."""
    import importlib

    import cxrbatch.ops.receive
    import cxrbatch.ops.scan
    import cxrbatch.ops.watch
    import cxrbatch.store.export  # noqa: F401
    import faults  # noqa: F401
    import fork_server
    from cxrbatch import cli  # noqa: F401

    for name in ("cxrbatch.ops.send", "cxrbatch.ops.review"):
        with suppress(ImportError):  # without their extras
            importlib.import_module(name)

    fork_server.serve(main)


def _clock() -> None:
    """Record how long each file takes: wall and CPU seconds, and its name."""
    if "TEST_TIMES" not in os.environ:
        return
    from cxrbatch.imaging import decode

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
    _wait() if sys.argv[1:] == ["--fork-server"] else main()
