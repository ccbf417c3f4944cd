"""Answers by dice: what a model without any sense would say under a grammar."""

from __future__ import annotations

import random

import numpy as np

from service.engine.sequence import Matcher

MAX_TOKENS = 5000


def allowed_tokens(matcher: Matcher, vocab_size: int) -> list[int]:
    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    matcher.fill_mask(words)
    return [int(index) for index in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def random_answer(matcher: Matcher, vocab_size: int, rng: random.Random) -> list[int]:
    """The tokens of one, up to its end."""
    ids: list[int] = []
    while not matcher.is_over:
        ids.append(rng.choice(allowed_tokens(matcher, vocab_size)))
        assert matcher.accept(ids[-1]), ids
        assert len(ids) < MAX_TOKENS
    return ids
