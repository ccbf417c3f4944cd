"""Which logits of one request are changed before sampling, and how: penalties, bias, banned tokens. Torch-free.

Only tokens that something is done to are listed, so a request that asks for nothing costs nothing, and one that asks
costs its distinct tokens. The lists grow with the answer; a step copies them into its upload.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.engine.messages import SamplingParams
from service.engine.sequence import Sequence

Words = NDArray[np.int32]

BAN = -1e30
"""Added to a logit, it leaves no chance beside any other token. Finite: a grammar that allows nothing else still may."""


def needs_edits(sampling: SamplingParams) -> bool:
    return bool(_counts_tokens(sampling) or sampling.logit_bias or sampling.bad_words or sampling.min_tokens)


def _counts_tokens(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


class TokenEdits:
    """A logit x of a listed token becomes (x / divisor if x > 0 else x * divisor) + addend.

    The divisor is the repetition penalty (Keskar et al., "CTRL", 2019) where the token stands in prompt or answer. The
    addend is bias - presence_penalty * [count > 0] - frequency_penalty * count (OpenAI's API reference), where count
    is how often the answer has the token; and BAN where it may not come next.
    """

    def __init__(self, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self._is_counting = _counts_tokens(sampling)
        self._repetition_penalty = sampling.repetition_penalty
        self._presence_penalty = sampling.presence_penalty
        self._frequency_penalty = sampling.frequency_penalty
        self._min_tokens = sampling.min_tokens
        self._num_prompt_tokens = sequence.num_prompt_tokens
        self._num_counted = sequence.num_prompt_tokens
        prompt = sequence.token_ids[: sequence.num_prompt_tokens] if sampling.repetition_penalty != 1 else []
        tokens = np.unique(np.array(prompt, dtype=np.int32))
        self._words: Words = np.zeros((3, len(tokens)), dtype=np.int32)
        """Token, and the bits of divisor and addend, of each listed token; beyond these there may be room."""
        self._floats = self._words.view(np.float32)
        self._words[0] = tokens
        self._floats[1] = sampling.repetition_penalty
        self._biases = [0.0] * len(tokens)
        self._counts = [0] * len(tokens)
        self._places: dict[int, int] = dict(zip(tokens.tolist(), range(len(tokens)), strict=True))
        for token_id, bias in sampling.logit_bias.items():
            self._add_bias(token_id, bias)
        self._ends = [self._place(token_id) for token_id in sequence.stop_token_ids] if sampling.min_tokens else []
        self._bad_words: dict[int, list[tuple[list[int], int]]] = {}
        """By the token before the last: the tokens before the last one, and the place of the last one."""
        for *before, last in sampling.bad_words:
            if before:
                self._bad_words.setdefault(before[-1], []).append((before, self._place(last)))
            else:
                self._add_bias(last, BAN)

    def advance(self, token_ids: list[int]) -> Words:
        """Take the tokens that are new since the last call. Returns (3, n): token, and the bits of divisor and addend.

        Each token is there once. Valid until the next call; `bans` tells which of them may not come next.
        """
        if self._is_counting:
            for token_id in token_ids[self._num_counted :]:
                self._count(token_id)
            self._num_counted = len(token_ids)
        return self._words[:, : len(self._places)]

    def bans(self, token_ids: list[int]) -> list[int]:
        """Where in the list the tokens are whose addend is BAN now."""
        banned = self._ends if len(token_ids) - self._num_prompt_tokens < self._min_tokens else []
        words = self._bad_words.get(token_ids[-1]) if self._bad_words else None
        return (
            banned
            if words is None
            else banned + [place for before, place in words if token_ids[-len(before) :] == before]
        )

    def _count(self, token_id: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._place(token_id)
        count = self._counts[place] + 1
        self._counts[place] = count
        self._floats[1, place] = self._repetition_penalty
        self._floats[2, place] = self._biases[place] - self._presence_penalty - self._frequency_penalty * count

    def _add_bias(self, token_id: int, bias: float) -> None:
        place = self._place(token_id)
        self._biases[place] += bias
        self._floats[2, place] = self._biases[place]

    def _place(self, token_id: int) -> int:
        """Where the token is listed; it is listed from now on."""
        place = self._places.get(token_id)
        if place is not None:
            return place
        place = len(self._places)
        if place == self._words.shape[1]:
            room = np.zeros((3, max(16, place)), dtype=np.int32)
            self._words = np.concatenate((self._words, room), axis=1)
            self._floats = self._words.view(np.float32)
        self._places[token_id] = place
        self._words[0, place], self._floats[1, place] = token_id, 1.0
        self._biases.append(0.0)
        self._counts.append(0)
        return place
