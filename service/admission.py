"""Who may start generating: everybody, up to a bounded number, until the service drains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import ApiError, unavailable


@dataclass(slots=True)
class Admission:
    limit: int
    """Answers that may be under way, waiting ones included."""
    active: int = 0
    draining: bool = False
    """Set when the service was asked to stop: what is active goes on, nothing new starts."""

    def refuse_while_draining(self) -> None:
        """Raises ApiError 503 once the service was asked to stop."""
        if self.draining:
            raise unavailable("the service is stopping and takes no new requests", retry_after=5)

    @contextmanager
    def enter(self, num_answers: int) -> Iterator[None]:
        """Hold places for the answers of one request. Raises ApiError 503 while draining, 429 when it is full."""
        self.refuse_while_draining()
        if self.active and self.active + num_answers > self.limit:
            raise ApiError(
                429,
                f"{self.active} answers are under way or waiting, of {self.limit} that may: try again later",
                code="overloaded",
                retry_after=1,
            )
        self.active += num_answers
        try:
            yield
        finally:
            self.active -= num_answers
