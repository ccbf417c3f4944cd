"""The words of one step on their way from the batches to the device: one upload, and a second one of grammars' masks."""

from __future__ import annotations

from collections.abc import Sequence as Items
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self

from torch import Tensor

from service.engine.batch import Batch, Sizes, write_words
from service.engine.masks import ALL, MaskFiller, MaskJob
from service.engine.rows import Rows, Words, mask_words
from service.engine.words import Buffer, Sections, divide, section_sizes


class StepInput:
    """Of a `with` statement: within it a background job may write to the buffer, after it nothing does."""

    def __init__(self, batches: Items[Batch], rows: Rows, sizes: Sizes, buffer: Buffer, filler: MaskFiller) -> None:
        self._buffer = buffer
        self._sections = [section_sizes(batch.shape) for batch in batches]
        self._num_inputs = [sum(section) for section in self._sections]
        self._num_masks = [batch.shape.masks * mask_words(sizes.vocab_size) for batch in batches]
        self._end = sum(self._num_inputs)
        parts = divide(buffer.clear(self._end + sum(self._num_masks)), self._num_inputs + self._num_masks)
        inputs, masks = parts[: len(batches)], parts[len(batches) :]
        for batch, section, words in zip(batches, self._sections, inputs, strict=True):
            write_words(batch, Sections(*divide(words, section)), rows, sizes)
        jobs = [job for batch, words in zip(batches, masks, strict=True) for job in _mask_jobs(batch, words, rows)]
        self._filling: Future[None] | None = filler.start(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._filling is not None:
            wait([self._filling])

    def upload(self) -> list[Sections[Tensor]]:
        """The input of each batch, and masks if they are there already, on the device."""
        num_masks = sum(self._num_masks) if self._filling is None else 0
        words = self._buffer.upload(0, self._end + num_masks)[: self._end]
        parts = zip(words.split(self._num_inputs), self._sections, strict=True)
        return [Sections(*part.split(section)) for part, section in parts]

    def upload_masks(self) -> tuple[Tensor, ...]:
        """The masks of each batch (K * ceil(V / 32),) on the device; waits until they are filled."""
        if self._filling is not None:
            self._filling.result()
            words = self._buffer.upload(self._end, self._end + sum(self._num_masks))
        else:
            words = self._buffer.uploaded(self._end, self._end + sum(self._num_masks))
        parts: tuple[Tensor, ...] = words.split(self._num_masks)
        return parts


def _mask_jobs(batch: Batch, words: Words, rows: Rows) -> list[MaskJob]:
    """Mask 0 is that of the rows without one."""
    if not batch.masked:
        return []
    masks = words.reshape(batch.shape.masks, -1)
    masks[0] = ALL
    sequences = [batch.chunks[batch.sampling[row]].sequence for row in batch.masked]
    return [
        MaskJob(masks[number], sequence.matcher, rows.masks[batch.rows[batch.sampling[row]]])
        for number, (row, sequence) in enumerate(zip(batch.masked, sequences, strict=True), start=1)
    ]
