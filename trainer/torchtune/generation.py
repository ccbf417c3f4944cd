"""What `tuneserve generate` is told, with torchtune's names and defaults. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.strict import Strict


class GenerationConfig(Strict):
    model_dir: str
    """Folder of the model."""
    tokenizer_file: str | None = None
    """The tokenizer.json or tokenizer.model to use. Default: what is in the model's folder."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the weights."""
    system: str | None = None
    """The system message."""
    user: str
    """The prompt."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 300
    """Longest answer."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.6
    """0 takes the likeliest token each time."""
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 300
    """Sample among so many of the likeliest tokens; null or 0: among all."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """null takes a random one."""
