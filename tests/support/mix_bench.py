"""Random mixes in real engines, and what each request gets in one alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from service.engine.messages import Logprobs, SamplingParams, TokenOutput
from tests.support.engines import Driver, tiny_engine_config
from tests.support.mixes import MAX_MODEL_LEN, SHAPES, Mix, random_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    dtype: str
    tie: float
    """Two best log probabilities nearer than this may come in either order."""
    tolerance: float
    """Of log probabilities."""
    is_exact: bool
    """No other difference is allowed. Otherwise those of drawn tokens, and after penalties, are counted only."""


FP32 = Precision(dtype="fp32", tie=1e-4, tolerance=1e-4, is_exact=True)
BF16 = Precision(dtype="bf16", tie=0.25, tolerance=0.5, is_exact=False)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What the engine said about one request."""

    prompt_ids: list[int]
    sampling: SamplingParams
    weights: int
    outputs: list[TokenOutput]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def logprobs(self) -> list[Logprobs]:
        return [logprobs for output in self.outputs for logprobs in output.logprobs]

    @property
    def prompt_logprobs(self) -> list[Logprobs]:
        return [logprobs for output in self.outputs for logprobs in output.prompt_logprobs]

    @property
    def is_aborted(self) -> bool:
        return self.outputs[-1].finish_reason == "abort"


@dataclass(slots=True)
class Session:
    """One mix in one engine."""

    driver: Driver
    mix: Mix
    model_ids: list[tuple[str, int]]
    """Loaded one after the other: a name, and which folder of weights it has."""
    folders: tuple[Path, ...]
    label: str
    answers: dict[int, Answer] = field(default_factory=dict)

    def run(self) -> dict[int, Answer]:
        due = dict(enumerate(self.mix.arrivals))
        for step in count():
            for index in [index for index, arrival in due.items() if arrival.at_step <= step]:
                if self._add(index):
                    del due[index]
            for index, arrival in enumerate(self.mix.arrivals):
                if arrival.abort_after is not None and step == arrival.at_step + arrival.abort_after:
                    self.driver.abort(self._name(index))
            if step == self.mix.swap_at:
                self._swap()
            if not due and not self.driver.engine.num_requests:
                break
            self.driver.step()
        self.driver.run_until(self._is_swapped)
        return self.answers

    def _add(self, index: int) -> bool:
        """Whether it went; a next turn waits for the one before it."""
        arrival = self.mix.arrivals[index]
        prompt_ids = arrival.prompt_ids
        if arrival.turn_after is not None:
            before = self.answers.get(arrival.turn_after)
            if before is None or not self.driver.is_finished(self._name(arrival.turn_after)):
                return False
            prompt_ids = (before.prompt_ids + before.token_ids + prompt_ids)[-(MAX_MODEL_LEN - 80) :]
        name, weights = self.model_ids[-1]
        outputs = self.driver.outputs.setdefault(self._name(index), [])
        self.answers[index] = Answer(prompt_ids=prompt_ids, sampling=arrival.sampling, weights=weights, outputs=outputs)
        self.driver.add(self._name(index), prompt_ids, name, **msgspec.structs.asdict(arrival.sampling))
        return True

    def _swap(self) -> None:
        old, weights = self.model_ids[-1]
        new = (f"{self.label}-new", 1 - weights)
        self.model_ids.append(new)
        self.driver.start_load(self.folders[new[1]], new[0], replaces=old)

    def _is_swapped(self) -> bool:
        """Drop the weights that were replaced."""
        (old, _), (new, _) = self.model_ids[-2:] if len(self.model_ids) > 1 else self.model_ids * 2
        if self.driver.load_outcome(new) is None:
            return False
        if old != new:
            self.driver.unload(old)
            del self.model_ids[:-1]
        return True

    def _name(self, index: int) -> str:
        return f"{self.label}-{index}"


@dataclass(slots=True)
class Bench:
    """Engines that stay from mix to mix, with what their pools hold, and one for the reference."""

    folders: tuple[Path, ...]
    """Two sets of weights of one architecture."""
    precision: Precision
    figures: Counter[str] = field(default_factory=lambda: Counter(divergences=0, ties=0))
    largest_error: float = 0.0
    _drivers: dict[int, tuple[Driver, list[tuple[str, int]]]] = field(default_factory=dict)
    _reference: Driver | None = None

    def run(self, seed: int) -> list[str]:
        """Run the mix of this seed; returns what is wrong with it."""
        mix = random_mix(seed)
        driver, model_ids = self._engine(mix.shape)
        first = len(driver.stats)
        session = Session(driver, mix, model_ids, self.folders, label=str(seed))
        answers = session.run()
        pool = driver.engine._scheduler.pool
        driver.engine._scheduler.check_idle()
        wrong = [f"{pool.num_used} blocks are lost"] if pool.num_used else []
        wrong += [f"{name} failed: {failure.message}" for name, failure in driver.failed.items()]
        driver.failed.clear()
        for index, answer in answers.items():
            wrong += [f"request {index}: {what}" for what in self._compare(answer)]
        stats = driver.stats[first:]
        self.figures.update(
            mixes=1,
            requests=len(answers),
            swaps=mix.swap_at is not None,
            aborted=sum(answer.is_aborted for answer in answers.values()),
            preempted=sum(figure.num_preempted for figure in stats),
            tokens=sum(figure.num_sampled for figure in stats),
            cached=sum(figure.num_prefix_hits for figure in stats),
            prompt_tokens=sum(len(answer.prompt_ids) for answer in answers.values()),
        )
        return [f"mix {seed}: {what}" for what in wrong]

    def _engine(self, shape: int) -> tuple[Driver, list[tuple[str, int]]]:
        if shape not in self._drivers:
            driver = self._driver(**SHAPES[shape])
            driver.load(self.folders[0], "first")
            self._drivers[shape] = driver, [("first", 0)]
        return self._drivers[shape]

    def _driver(self, **config: Any) -> Driver:
        fields = {"max_model_len": MAX_MODEL_LEN, "dtype": self.precision.dtype, **config}
        if self.precision.dtype != "fp32" and "kv_cache_bytes" in fields:
            fields["kv_cache_bytes"] //= 2
        return Driver(tiny_engine_config(self.folders[0], **fields))

    def _alone(self, answer: Answer) -> Answer:
        """The same request in an engine that has nothing else to do and remembers nothing."""
        if self._reference is None:
            self._reference = self._driver(max_num_batched_tokens=MAX_MODEL_LEN)
            for index, folder in enumerate(self.folders):
                self._reference.load(folder, str(index))
        driver, sampling = self._reference, answer.sampling
        driver.engine._scheduler.forget_others(())
        asked = msgspec.structs.replace(sampling, logprobs=max(2, sampling.logprobs or 0))
        driver.generate(answer.prompt_ids, str(answer.weights), **msgspec.structs.asdict(asked))
        name = next(reversed(driver.outputs))
        return Answer(
            prompt_ids=answer.prompt_ids, sampling=asked, weights=answer.weights, outputs=driver.outputs.pop(name)
        )

    def _compare(self, answer: Answer) -> list[str]:
        alone = self._alone(answer)
        got, wanted = answer.token_ids, alone.token_ids
        if answer.is_aborted:
            wanted = wanted[: len(got)]
        if got != wanted:
            return self._diverged(got, wanted, alone)
        wrong = [] if answer.is_aborted else _compare_ends(answer, alone)
        if (asked := answer.sampling.logprobs) is not None:
            wrong += self._compare_logprobs("logprobs", answer.logprobs, alone.logprobs[: len(got)], asked)
        if (asked := answer.sampling.prompt_logprobs) is not None:
            told = answer.prompt_logprobs
            wanted_logprobs = alone.prompt_logprobs[: len(told) if answer.is_aborted else None]
            wrong += self._compare_logprobs("prompt_logprobs", told, wanted_logprobs, asked)
        return wrong

    def _diverged(self, got: list[int], wanted: list[int], alone: Answer) -> list[str]:
        self.figures["divergences"] += 1
        place = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
        told = alone.logprobs[place].top_logprobs if place < len(alone.logprobs) else (0.0, -1.0)
        if _is_plain(alone.sampling):
            if told[0] - told[1] < self.precision.tie:
                self.figures["ties"] += 1
                return []
        elif not self.precision.is_exact:
            return []
        return [f"{alone.sampling}: token {place} of {got} is not that of {wanted}; the best are {told}"]

    def _compare_logprobs(self, what: str, got: list[Logprobs], wanted: list[Logprobs], asked: int) -> list[str]:
        if len(got) != len(wanted):
            return [f"{len(got)} {what} and not {len(wanted)}"]
        for one, other in zip(got, wanted, strict=True):
            if len(one.top_logprobs) != asked:
                return [f"{what}: {len(one.top_logprobs)} alternatives and not {asked}"]
            pairs = [(one.logprob, other.logprob), *zip(one.top_logprobs, other.top_logprobs, strict=False)]
            error = max(abs(a - b) for a, b in pairs)
            self.largest_error = max(self.largest_error, error)
            if error > self.precision.tolerance:
                return [f"{what}: {one} and not {other}"]
        return []


def _compare_ends(answer: Answer, alone: Answer) -> list[str]:
    last, wanted = answer.outputs[-1], alone.outputs[-1]
    ends = [(last.finish_reason, last.stop_token_id), (wanted.finish_reason, wanted.stop_token_id)]
    wrong = [] if ends[0] == ends[1] else [f"it ended with {ends[0]} and not {ends[1]}"]
    cached = [output.num_cached_tokens for output in answer.outputs]
    if cached[0] is None or any(told is not None for told in cached[1:]):
        wrong.append(f"cached tokens are told as {cached}")
    if alone.outputs[0].num_cached_tokens != 0:
        wrong.append("the reference read a cache")
    return wrong


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether its tokens are those with the best log probabilities that are told."""
    plain = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=0.0,
        seed=sampling.seed,
        choice=sampling.choice,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
    return sampling == plain
