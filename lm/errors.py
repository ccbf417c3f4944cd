"""The one exception for mistakes of a user: everything they can write wrong in a request, a config or a file."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend. The message names the field, the value and the mend.

    `param` is the dotted name of the field at fault, as the user wrote it; the HTTP edge puts it into the error object.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(UserError):
    """The user named something (a model, a file, a job) that does not exist. HTTP: 404."""
