"""What sampling means, token by token in plain Python: what the vectorised sampler is held to."""

from __future__ import annotations

import math

from service.engine.messages import SamplingParams


def edited_logits(
    logits: list[float],
    sampling: SamplingParams,
    prompt: list[int],
    answer: list[int],
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[float]:
    """After penalties, bias, bans and allowed tokens."""
    text = [*prompt, *answer]
    edited = []
    for token, logit in enumerate(logits):
        if token in text:
            penalty = sampling.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        count = answer.count(token)
        logit -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
        logit += sampling.logit_bias.get(token, 0.0)
        is_early_end = token in stop_token_ids and len(answer) < sampling.min_tokens
        is_allowed = sampling.allowed_token_ids is None or token in sampling.allowed_token_ids
        if is_early_end or not is_allowed or _ends_bad_word(token, text, sampling):
            logit = -math.inf
        edited.append(logit)
    return edited


def _ends_bad_word(token: int, text: list[int], sampling: SamplingParams) -> bool:
    return any([*text, token][-len(word) :] == list(word) for word in sampling.bad_words)


def distribution(logits: list[float], sampling: SamplingParams) -> list[float]:
    """Probabilities: temperature, then top-k, then top-p, then min-p, in the order of transformers' warpers."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    largest = logits[order[0]]
    weights = [math.exp((logit - largest) / sampling.temperature) for logit in logits]
    kept = order[: sampling.top_k] if sampling.top_k else order
    if sampling.top_p < 1:
        total, before = sum(weights[token] for token in kept), 0.0
        nucleus: list[int] = []
        for token in kept:
            if nucleus and before >= sampling.top_p * total:
                break
            nucleus.append(token)
            before += weights[token]
        kept = nucleus
    kept = [token for token in kept if weights[token] >= sampling.min_p]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def possible_tokens(probabilities: list[float], uniform: float, tolerance: float = 1e-5) -> set[int]:
    """The token that `uniform` picks in the order of the vocabulary, and its neighbours where rounding may decide."""
    cumulative, possible = 0.0, set()
    for token, probability in enumerate(probabilities):
        if probability and cumulative - tolerance <= uniform <= cumulative + probability + tolerance:
            possible.add(token)
        cumulative += probability
    return possible
