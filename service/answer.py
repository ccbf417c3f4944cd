"""One answer on its way: what was asked, how far it has come, and the pieces that tell it. Knows no engine process."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from service.detokenizer import Detokenizer
from service.engine.messages import EngineReady, FinishReason, Logprobs, RequestTiming, SamplingParams, TokenOutput
from service.registry import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt, and how `n` answers to it are made."""

    prompt_ids: list[int]
    sampling: SamplingParams
    """Final, but for `choice`."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Those of `sampling.stop_token_ids` that the client named: a `stop_reason` tells them."""
    include_stop: bool = False
    """Show what ended the answer, a stop string or the text of a token."""
    skip_special_tokens: bool = True
    prompt_text: str | None = None
    """If it is known."""


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    index: int
    """Among the answers of the request: those to the first prompt come first."""
    prompt_index: int
    ask: Ask
    sampling: SamplingParams
    detokenizer: Detokenizer
    engine: EngineReady
    """The engine that it was prepared for."""
    started: float
    """Seconds on time.monotonic(), as are the other times."""
    entry: Entry | None = None
    """Whose weights answer. Known with the first piece."""
    token_ids: list[int] = field(default_factory=list)
    """Up to the token that ended it: an end-of-sequence token, or the one that completed a stop string."""
    logprobs: list[Logprobs] = field(default_factory=list)
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """From the prompt's second token on, if asked for. Complete with the first piece."""
    num_cached_tokens: int = 0
    """Of the prompt, which were not computed."""
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    timing: RequestTiming | None = None
    """The engine's own, for a complete answer. None where the engine died as a stop string ended it."""
    num_told: int = 0
    """Tokens that the pieces so far had."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def outcome(self) -> FinishReason:
        """Why it ended. Only for a complete answer."""
        assert self.finish_reason is not None
        return self.finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """What of the request's own stop strings or tokens ended it."""
        if self.stop_token_id in self.ask.stop_token_ids:
            return self.stop_token_id
        return self.detokenizer.stopped_by

    def take(self, output: TokenOutput) -> Piece | None:
        """Take the tokens of one step, up to the one that completes a stop string. None where there is nothing to tell."""
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs:
            self.prompt_logprobs += output.prompt_logprobs
        num_before = len(self.token_ids)
        text = self._add(output)
        if output.logprobs:
            self.logprobs += output.logprobs[: len(self.token_ids) - num_before]
        if text or self.finish_reason is not None or (output.logprobs and output.token_ids):
            return self._piece(text)
        return None

    def _add(self, output: TokenOutput) -> str:
        """Returns the text that is certain now and was not before."""
        is_shown = output.stop_token_id is None or self.ask.include_stop
        token_ids, detokenizer, min_tokens = self.token_ids, self.detokenizer, self.sampling.min_tokens
        text = ""
        for token_id in output.token_ids if is_shown else output.token_ids[:-1]:
            token_ids.append(token_id)
            text += detokenizer.add(token_id, may_end=len(token_ids) >= min_tokens)
            if detokenizer.stopped_by is not None:
                self.finish_reason = "stop"
                return text
        if not is_shown:
            token_ids.append(output.token_ids[-1])
        return text if output.finish_reason is None else text + self._end(output.finish_reason, output.stop_token_id)

    def _end(self, reason: FinishReason, stop_token_id: int | None) -> str:
        """Returns the tail of the text, in which a stop string may be completed, too."""
        text = self.detokenizer.flush()
        if self.detokenizer.stopped_by is None:
            self.finish_reason, self.stop_token_id = reason, stop_token_id
        else:
            self.finish_reason = "stop"
        return text

    def _piece(self, text: str) -> Piece:
        """With all that has come since the last one."""
        told, self.num_told = self.num_told, len(self.token_ids)
        return Piece(
            answer=self,
            text=text,
            token_ids=tuple(self.token_ids[told:]),
            logprobs=tuple(self.logprobs[told:]) if self.logprobs else (),
            num_tokens=self.num_told,
            finish_reason=self.finish_reason,
        )


class Piece(msgspec.Struct, kw_only=True, frozen=True, gc=False):  # one for every token
    """New text of one answer. Where there is none, the finish reason or log probabilities have come."""

    answer: Answer
    text: str
    token_ids: tuple[int, ...]
    """Those since the piece before."""
    logprobs: tuple[Logprobs, ...]
    num_tokens: int
    """Of the answer, this piece's included."""
    finish_reason: FinishReason | None
