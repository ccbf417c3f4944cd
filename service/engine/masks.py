"""Which tokens may come next, of the rows that a grammar or a list of allowed tokens binds. Filled beside the device.

A step's matchers fill their masks in one background job that begins before the forwards and is joined before sampling.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from service.engine.edits import Words
from service.engine.sequence import Matcher

ALL = -1
"""Every bit is set."""


@dataclass(frozen=True, slots=True)
class MaskJob:
    """Fill `words` with what `matcher` and the `allowed` tokens let through; None lets all through."""

    words: Words
    matcher: Matcher | None
    allowed: Words | None

    def run(self) -> None:
        if self.matcher is not None:
            self.matcher.fill_mask(self.words)
            if self.allowed is not None:
                np.bitwise_and(self.words, self.allowed, out=self.words)
        elif self.allowed is not None:
            self.words[:] = self.allowed


class MaskFiller:
    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, jobs: Items[MaskJob]) -> Future[None] | None:
        """Fill what no grammar has a say in at once, the rest in the background; None when nothing is left to do."""
        behind = [job for job in jobs if job.matcher is not None]
        _run_all(job for job in jobs if job.matcher is None)
        return self._executor.submit(_run_all, behind) if behind else None


def _run_all(jobs: Iterable[MaskJob]) -> None:
    for job in jobs:
        job.run()
