"""Log probabilities: computed on the device, packed for the step's download, unpacked on the host.

Shapes: N tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.messages import Logprobs

SLICE_BYTES = 64 << 20
"""Of fp32 logits held at a time, for prompts: all at once could be many times the weights."""
TOP_SIZES = (0, 1, 5, 20)
"""How many of the likeliest tokens are computed, so that the shapes stay few."""


def top_size(num_top: int, vocab_size: int) -> int:
    """The smallest of TOP_SIZES that is enough."""
    return min(next((size for size in TOP_SIZES if size >= num_top), num_top), vocab_size)


def pack_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """(N, V) logits, (N,) int32 -> (N, 2 + 2K) int32: log probability and rank, then both of the K likeliest.

    log_softmax of the raw logits in fp32. All values of a row come from the same numbers, so the log probability of the
    likeliest token is exactly the first of the likeliest ones.
    """
    values = logits.log_softmax(-1, dtype=torch.float32)
    chosen = values.gather(1, token_ids.long().unsqueeze(1))
    rank = (values > chosen).sum(-1, keepdim=True, dtype=torch.int32) + 1
    top = values.topk(num_top)
    return torch.cat((chosen.view(torch.int32), rank, top.values.view(torch.int32), top.indices.int()), -1)


def pack_prompt_logprobs(
    hidden: Tensor, token_ids: Tensor, num_top: int, *, logits_of: Callable[[Tensor], Tensor], vocab_size: int
) -> list[Tensor]:
    """As `pack_logprobs`, of the logits of (N, W) hidden states, in parts that follow each other."""
    size = max(1, SLICE_BYTES // (4 * vocab_size))
    slices = zip(hidden.split(size), token_ids.split(size), strict=True)
    return [pack_logprobs(logits_of(part), ids, num_top) for part, ids in slices]


def unpack_logprobs(words: NDArray[np.int32], wanted: Items[int | None]) -> Iterator[Logprobs | None]:
    """Of (N, 2 + 2K) packed words those rows for which something is wanted, with so many of the likeliest tokens."""
    num_top = words.shape[1] // 2 - 1
    values = words.view(np.float32)
    rows = zip(
        wanted,
        values[:, 0].tolist(),
        words[:, 1].tolist(),
        values[:, 2 : 2 + num_top].tolist(),
        words[:, 2 + num_top :].tolist(),
        strict=True,
    )
    for count, logprob, rank, top_logprobs, top_ids in rows:
        if count is None:
            yield None
        else:
            yield Logprobs(logprob, tuple(top_ids[:count]), tuple(top_logprobs[:count]), rank)
