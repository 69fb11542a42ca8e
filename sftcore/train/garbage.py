"""Python's garbage collector: at chosen moments between steps instead of anywhere inside one.

In: the end of each step. Out: a collection every `EVERY_STEPS` steps.
Invariant: while the loop runs, no rank pauses in a step for it; the collector is as it was afterwards.
Trade-off: cyclic garbage of `EVERY_STEPS` steps stays until then (kilobytes: a step's tensors are freed by
reference counts), against pauses of 50 to 300 ms at random steps, for which all other ranks wait.
"""

from __future__ import annotations

import gc
from types import TracebackType

EVERY_STEPS = 100


class GarbageCollector:
    """Context manager: off inside, but for `step_done`."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._was_enabled = False

    def __enter__(self) -> GarbageCollector:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.freeze()  # what lives now (modules, the model) is not looked through again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def step_done(self) -> None:
        """Collect, every `EVERY_STEPS` steps."""
        self._num_steps += 1
        if self._num_steps % EVERY_STEPS == 0:
            gc.collect()
