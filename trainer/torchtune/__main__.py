"""`python -m trainer.torchtune` prints docs/torchtune.md."""

from __future__ import annotations

from trainer.torchtune.table import markdown

if __name__ == "__main__":
    print(markdown(), end="")
