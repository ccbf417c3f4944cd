"""How large a proof is: as large as its figures say for who repeats them, smaller in CI, which ends within the hour."""

from __future__ import annotations

import os


def proof_size(full: int, *, in_ci: int) -> int:
    """`full` where TUNESERVE_PROOF_SIZE is `full`, as the Makefile's proof targets set it, else `in_ci`."""
    return full if os.environ.get("TUNESERVE_PROOF_SIZE") == "full" else in_ci
