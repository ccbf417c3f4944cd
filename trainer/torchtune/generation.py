"""What `tuneserve generate` is asked to do: torchtune's generation config in our own terms. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config import Strict


class GenerationConfig(Strict):
    model_dir: Annotated[str, Field(min_length=1)]
    """The folder of the model: Hugging Face's layout, torchtune's or Meta's."""
    tokenizer_file: str | None = None
    """The tokenizer to use in place of the one found in `model_dir`."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the weights. `auto` is what the device is fast at."""
    system: str | None = None
    """The system prompt."""
    user: Annotated[str, Field(min_length=1)]
    """What is asked."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 300
    """The answer is cut there, if the model has not ended it before."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.6
    """0 is greedy: the likeliest token each time."""
    top_k: Annotated[int, Field(ge=1)] | None = 300
    """Draw among so many of the likeliest tokens; null draws among all."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """The same seed gives the same answer on the same device; null draws one."""
