"""The answers of the model in training to a few fixed prompts, so that one sees it change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.errors import UserError
from lm.model import CausalLM
from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from trainer.config import RunConfig

BLOCK_SIZE = 128
"""What NPUs want; on the other devices it is as good as another one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt of a user and what the model answers."""

    prompt: str
    text: str


class Samples:
    """The prompts of a run, encoded once. Raises UserError for one that leaves no room for an answer."""

    def __init__(self, template: ChatTemplate, prompts: Sequence[str], *, max_tokens: int, context: int) -> None:
        """`context` is the number of positions that the model has."""
        self.prompts = tuple(prompts)
        self._tokenizer = template.tokenizer
        self._ids = [_encode(template, index, prompt, context) for index, prompt in enumerate(prompts)]
        self._max_tokens = [min(max_tokens, context - len(ids)) for ids in self._ids]

    def answer(self, model: CausalLM) -> list[Sample]:
        """Greedy answers, without the token that ends them.

        The model is left in the mode it was in, and no random number is drawn. Under autocast the cache has its type.
        """
        was_training = model.training
        model.eval()
        try:
            answers = self._generate(model)
        finally:
            model.train(was_training)
        return [
            Sample(prompt, self._tokenizer.decode(ids).rstrip("\ufffd"))  # a character that was cut
            for prompt, ids in zip(self.prompts, answers, strict=True)
        ]

    @torch.no_grad()
    def _generate(self, model: CausalLM) -> list[list[int]]:
        lengths = [len(ids) for ids in self._ids]
        rows = _Rows(model, len(lengths), max(map(sum, zip(lengths, self._max_tokens, strict=True))))
        answers: list[list[int]] = [[] for _ in lengths]
        last = [rows.prefill(row, ids) for row, ids in enumerate(self._ids)]
        for count in range(max(self._max_tokens)):
            for row, token in enumerate(last):
                if self._goes_on(answers[row], self._max_tokens[row]):
                    answers[row].append(token)
            if not any(map(self._goes_on, answers, self._max_tokens)):
                break
            # A row that has ended goes on in its own last slot, where nobody reads
            last = rows.decode(last, [min(length + count, rows.capacity - 1) for length in lengths])
        return [ids[:-1] if ids[-1] in self._tokenizer.eos_token_ids else ids for ids in answers]

    def _goes_on(self, answer: list[int], max_tokens: int) -> bool:
        ended = bool(answer) and answer[-1] in self._tokenizer.eos_token_ids
        return not ended and len(answer) < max_tokens


def load_samples(config: RunConfig, base: Path, context: int) -> Samples | None:
    """The prompts of a run, written with the template that its data is written with. None where it has none.

    Raises UserError for a prompt that leaves no room for an answer.
    """
    if not config.sample_prompts:
        return None
    file = None if config.tokenizer_file is None else Path(config.tokenizer_file)
    template = load_template(base, load_tokenizer(base, file))
    return Samples(template, config.sample_prompts, max_tokens=config.sample_max_tokens, context=context)


class _Rows:
    """The cache of several sequences, each in blocks of its own."""

    def __init__(self, model: CausalLM, num_rows: int, num_tokens: int) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        blocks = -(-num_tokens // BLOCK_SIZE)
        self.capacity = blocks * BLOCK_SIZE
        self.cache = KVCache.allocate(model.config, 1 + num_rows * blocks, BLOCK_SIZE, self.device, dtype)
        table = torch.arange(1, 1 + num_rows * blocks, dtype=torch.int32)
        self.table = table.view(num_rows, blocks).to(self.device)

    def prefill(self, row: int, ids: Sequence[int]) -> int:
        """The token that is likeliest behind `ids`, by themselves: padded, long prompts would make masks too large."""
        positions = torch.arange(len(ids), dtype=torch.int32, device=self.device)[None]
        return self._forward(torch.tensor([ids]), positions, self.table[row : row + 1])[0]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The likeliest next token of each row."""
        where = torch.tensor(positions, dtype=torch.int32, device=self.device)[:, None]
        return self._forward(torch.tensor(tokens)[:, None], where, self.table)

    def _forward(self, ids: Tensor, positions: Tensor, table: Tensor) -> list[int]:
        blocks = table.gather(1, positions.long() // BLOCK_SIZE)
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        paged = PagedBatch(cache=self.cache, slot_mapping=slots.flatten(), block_table=table)
        hidden = self.model(ids.to(self.device), positions, paged)
        tokens: list[int] = self.model.logits(hidden[:, -1]).argmax(-1).tolist()
        return tokens


def _encode(template: ChatTemplate, index: int, prompt: str, context: int) -> list[int]:
    ids = template.encode([{"role": "user", "content": prompt}], add_generation_prompt=True)
    if len(ids) >= context:
        raise UserError(
            f"sample_prompts[{index}]: its {len(ids)} tokens fill the model's context of {context}; shorten it",
            param=f"sample_prompts[{index}]",
        )
    return ids
