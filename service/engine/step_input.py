"""The words of one step on their way from the batches to the device: one upload, and a second one of grammars' masks."""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, wait
from itertools import accumulate
from types import TracebackType
from typing import Self

from torch import Tensor

from service.engine.batch import Batch, Sizes, write_words
from service.engine.edits import Words
from service.engine.masks import ALL, MaskFiller, MaskJob
from service.engine.rows import Rows, mask_words
from service.engine.words import Buffer, num_words


class StepInput:
    """Of a `with` statement: within it a background job may write to the buffer, after it nothing does."""

    def __init__(self, batches: Items[Batch], rows: Rows, sizes: Sizes, buffer: Buffer, filler: MaskFiller) -> None:
        self._buffer = buffer
        places = list(accumulate((num_words(batch.shape) for batch in batches), initial=0))
        width = mask_words(sizes.vocab_size)
        self._mask_places = list(accumulate((batch.shape.masks * width for batch in batches), initial=places[-1]))
        words = buffer.clear(self._mask_places[-1])
        self.frames = [buffer.frame(place, batch.shape) for place, batch in zip(places, batches, strict=False)]
        for batch, frame in zip(batches, self.frames, strict=True):
            write_words(batch, frame.host, rows, sizes)
        jobs: list[MaskJob] = []
        for place, batch in zip(self._mask_places, batches, strict=False):
            if batch.masked:
                masks = words[place : place + batch.shape.masks * width].reshape(-1, width)
                jobs += _mask_jobs(batch, masks, rows)
        self._filling: Future[None] | None = filler.start(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._filling is not None:
            wait([self._filling])

    def upload(self) -> None:
        """Everything, but for masks that are still being filled."""
        self._buffer.upload(0, self._mask_places[-1 if self._filling is None else 0])

    def upload_masks(self) -> None:
        """Wait for the masks that were not there yet, if any."""
        if self._filling is not None:
            self._filling.result()
            self._buffer.upload(self._mask_places[0], self._mask_places[-1])

    def masks_of(self, index: int) -> Tensor:
        """(K * ceil(V / 32),) masks of one batch on the device."""
        return self._buffer.uploaded(self._mask_places[index], self._mask_places[index + 1])


def _mask_jobs(batch: Batch, masks: Words, rows: Rows) -> list[MaskJob]:
    """Mask 0 is that of the rows without one."""
    masks[0] = ALL
    jobs = []
    for number, row in enumerate(batch.masked, start=1):
        index = batch.sampling[row]
        jobs.append(MaskJob(masks[number], batch.chunks[index].sequence.matcher, rows.masks[batch.rows[index]]))
    return jobs
