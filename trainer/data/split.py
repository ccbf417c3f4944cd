"""Slices of a split, written as Hugging Face datasets has them: `train[:10%]`, `train[100:200]`, `train[-5%:]`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from lm.errors import UserError
from trainer.data.errors import DataError

ItemT = TypeVar("ItemT")

WHOLE = "train"
MEND = "write train, train[:10%], train[100:200] or train[-5%:]"

_bound = r"(-?\d{1,12})?\s*(%)?"
_slice = re.compile(rf"\s*(?P<name>[^\[\]]*?)\s*(?:\[\s*{_bound}\s*(:)\s*{_bound}\s*\])?\s*")


@dataclass(frozen=True, slots=True)
class Split:
    """Bounds as written: None where left out, in records or in percent, counted from the end when negative."""

    start: int | None = None
    stop: int | None = None
    in_percent: bool = False
    text: str = WHOLE
    name: str = WHOLE

    @property
    def needs_count(self) -> bool:
        """Whether the records must be counted before the first one can be taken."""
        return self.in_percent or any(bound is not None and bound < 0 for bound in (self.start, self.stop))

    def bounds(self, num_records: int | None) -> tuple[int, int | None]:
        """First record and the one after the last, from 0; `num_records` may be None unless `needs_count`.

        Percent are rounded to the nearest record, and a half to the even one, as in datasets.
        """
        start, stop = (self._absolute(bound, num_records) for bound in (self.start, self.stop))
        return start or 0, stop

    def _absolute(self, bound: int | None, num_records: int | None) -> int | None:
        if bound is None or num_records is None:
            return bound
        if self.in_percent:
            bound = round(bound * num_records / 100)
        return min(num_records, max(0, bound + num_records if bound < 0 else bound))


def parse_split(text: str, *, any_name: bool = False) -> Split:
    """With `any_name` of another split, too, as in `validation[:100]`. Raises UserError that names the value and what
    may stand there.
    """
    match = _slice.fullmatch(text)
    if match is None:
        raise UserError(f"split: {text!r:.80} is not a split; {MEND}", param="split")
    name, start, start_unit, colon, stop, stop_unit = match.groups()
    if not any_name and name != WHOLE:
        raise UserError(f"split: {text!r:.80}: files of data have the split {WHOLE} only; {MEND}", param="split")
    if not name:
        raise UserError(f"split: {text!r:.80} names no split; {MEND}", param="split")
    if colon is None:
        return Split(text=text, name=name)
    return replace(_checked(start, start_unit, stop, stop_unit, text), name=name)


def _checked(start: str | None, start_unit: str | None, stop: str | None, stop_unit: str | None, text: str) -> Split:
    units = {unit for bound, unit in ((start, start_unit), (stop, stop_unit)) if bound is not None}
    if len(units) == 2:
        raise UserError(f"split: {text!r:.80} mixes records and percent; {MEND}", param="split")
    if (start is None and start_unit) or (stop is None and stop_unit):
        raise UserError(f"split: {text!r:.80} has a % without a number; {MEND}", param="split")
    split = Split(None if start is None else int(start), None if stop is None else int(stop), "%" in units, text)
    bounds = [bound for bound in (split.start, split.stop) if bound is not None]
    if split.in_percent and any(abs(bound) > 100 for bound in bounds):
        raise UserError(f"split: {text!r:.80} is beyond 100%; {MEND}", param="split")
    same_sign = len(bounds) == 2 and (bounds[0] < 0) == (bounds[1] < 0)
    if same_sign and bounds[0] >= bounds[1]:
        raise UserError(f"split: {text!r:.80} holds nothing: it stops before it starts; {MEND}", param="split")
    return split


def take(split: Split, read: Callable[[], Iterator[ItemT]]) -> Iterator[ItemT]:
    """The items of `read()` that `split` names. They are read twice where they must be counted first.

    Raises DataError where there is none.
    """
    count = sum(1 for _ in read()) if split.needs_count else None
    start, stop = split.bounds(count)
    is_empty = True
    for item in itertools.islice(read(), start, stop):
        is_empty = False
        yield item
    if is_empty:
        of = "" if count is None else f" of the {count}"
        raise DataError(f"split: {split.text!r:.80} holds none{of} records; choose a larger slice", param="split")
