"""Grammars over a model's tokens, by the llguidance library: which tokens may come next in an answer. Torch-free.

A grammar is text in a form of llguidance's; `service.structured_output` writes it. Tokens that are no text are allowed
where a grammar names them, and those that end an answer where it may end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from lm.errors import UserError
from lm.sentencepiece_backend import SentencePieceBackend
from lm.token_bytes import token_bytes
from lm.tokenizer import Tokenizer, load_tokenizer
from service.engine.sequence import Matcher

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, max_lexer_states=50_000, step_max_items=10_000, verbose_errors=False
)
"""A fifth of llguidance's own: a mask of the worst grammars then takes 0.1 s and not 1 s, for all of its batch, and what
is learned of one grammar up to 0.1 GB. JSON schemas of 64 KB fit."""
MAX_COMPILED = 32
"""Grammars that are kept for the next request."""
MAX_REASON = 300  # characters
LEAD = "\x02"  # no vocabulary has it in a longer token
NO_TEXT = b"\xff"
"""With it llguidance marks tokens that are no text: it stands in no UTF-8."""


class Vocabulary(TokenizerWrapper):
    """A tokenizer as LLTokenizer takes one: the bytes of each token, and a text as tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_token_ids[0]
        unknown = (tokenizer.backend.unknown,) if isinstance(tokenizer.backend, SentencePieceBackend) else ()
        bytes_of = token_bytes(tokenizer)
        self.special_token_ids = sorted({*bytes_of.special, *unknown, *tokenizer.eos_token_ids})
        # nothing for the rows of the embedding that have no token: they are never allowed
        tokens = [bytes_of(token_id) for token_id in range(vocab_size)]
        for token_id in self.special_token_ids:
            tokens[token_id] = NO_TEXT + tokens[token_id]
        self.tokens = tokens
        self.spell: Callable[[str], list[int]] = lambda text: []
        """How a text is cut where the tokenizer does not keep its bytes."""
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of `text`, as it stands in the midst of another text."""
        wanted = text.encode()
        ids = self._encode(text)
        if self._join(ids) == wanted:
            return ids
        ids = self._encode(LEAD + text)  # takes the space that some tokenizers put before a text
        for num_lead in (1, 2):
            if self._join(ids[num_lead:]) == wanted:
                return ids[num_lead:]
        ids = self.spell(text)
        if self._join(ids) != wanted:
            raise UserError("the tokenizer has no tokens for it")
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in ids)


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Set a bit in `words` (ceil(vocab_size / 32),) for each token that may come next. Other threads go on.

        Where this fails, only the end is allowed, and `accept` refuses it.
        """
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False where the grammar does not have it, and for ever after; see `failure`."""
        return self._inner.consume_token(token_id) and not self._inner.is_error()

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end may follow."""
        stopped: bool = self._inner.is_stopped()
        return stopped

    @property
    def failure(self) -> str | None:
        """Why it cannot go on: the grammar turned out to be too complex, or the token was not allowed."""
        return _reason(self._inner.get_error()) if self._inner.is_error() else None


class GrammarCompiler:
    """Compiles grammars for the tokenizer of one model folder, one after another. Reads it when it is first needed."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def compile(self, grammar: str) -> Future[Matcher]:
        """Returns at once. The future raises UserError for what is no grammar, or too complex."""
        return self._executor.submit(self.build, grammar)

    def build(self, grammar: str) -> Matcher:
        """`compile` in this thread; only one may call it. What it costs is bounded by LIMITS alone, which bad grammars
        get around: check those of users in another process first."""
        compiled = self._compiled.pop(grammar, None) or self._compile(grammar)
        matcher = _begin(compiled)
        if matcher.failure is not None:  # perhaps that of an earlier answer
            compiled = self._compile(grammar)
            matcher = _begin(compiled)
        if matcher.failure is not None:
            raise UserError(matcher.failure)
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer = load_tokenizer(self._folder)
        if not tokenizer.eos_token_ids:
            raise UserError("this model has no token that ends an answer, which structured output needs")
        vocabulary = Vocabulary(tokenizer, self._vocab_size)
        made = LLTokenizer(vocabulary, eos_token=list(tokenizer.eos_token_ids))
        vocabulary.spell = made.greedy_tokenize
        return made


def _begin(compiled: LLMatcher) -> GrammarMatcher:
    """A matcher at the start of the grammar, after its first mask. It shares what is learned of the grammar with
    `compiled`, a failure included."""
    copy = compiled.deep_copy()
    copy.compute_bitmask()
    return GrammarMatcher(copy)


def _reason(error: str) -> str:
    """The line of llguidance's message that says what is wrong."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    if lines[0] == "NoExtensionBias":
        return "no text follows it"
    if lines[0].startswith("panic"):
        return "llguidance fails on it, or the model's tokenizer cannot write what it asks for"
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines)[0][:MAX_REASON]
