"""SentencePiece's `tokenizer.model` (Llama 2, Mistral and others; BPE or unigram), run by its own library. Torch-free.

Text is cut at the special and added tokens that are spelled in it; what lies between is SentencePiece's. It puts a
space before each such part if the model wants one, as transformers' `legacy` tokenizers and Meta's code do, or with
`"legacy": false` in tokenizer_config.json before the first part only. Decoding takes one space from the start of the
text and none from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from lm.errors import UserError
from lm.tokenizer_settings import TokenSettings

SPACE = "▁"
WHITE_SPACE = re.compile(r"\s*")
# Protobuf messages merge by concatenation. NormalizerSpec is field 3 of the model, add_dummy_prefix its field 3,
# remove_extra_whitespaces its field 4.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
VERBATIM = b"\x1a\x04\x18\x00\x20\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceBackend:
    pieces: SentencePieceProcessor
    behind_tokens: SentencePieceProcessor
    """Encodes what stands behind a special token."""
    verbatim: SentencePieceProcessor
    """Decodes, and keeps the first space."""
    drops_prefix: bool
    """Whether a space at the start of the text is the prefix that encoding adds."""
    texts: tuple[str, ...]
    """Of the model's own pieces, by id."""
    added: Mapping[int, str]
    """Tokens that the model does not have or that the settings make special, by id."""
    ids: Mapping[str, int]
    """Ids of all that is found when it is spelled in a text."""
    special: frozenset[int]
    unknown: int
    pattern: re.Pattern[str]
    """Finds those."""
    swallows_left: frozenset[str]
    swallows_right: frozenset[str]
    """Tokens that take the white space before or behind them with them."""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.texts) + sum(token_id >= len(self.texts) for token_id in self.added)

    @property
    def last_id(self) -> int:
        return max([len(self.texts) - 1, *self.added])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for part, processor, _ in self._parts(text):
            ids += [self.ids[part]] if processor is None else processor.encode_as_ids(part)
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens without a character of their own, a prefix space or all but the last byte of a character, end with
        the one behind them.
        """
        ids: list[int] = []
        ends: list[int] = []
        for part, processor, (start, stop) in self._parts(text):
            if processor is None:
                ids.append(self.ids[part])
                ends.append(stop)
            else:
                found = processor.encode_as_offset_mapping(part)
                ids += found["ids"]
                ends += [start + end for end in _ends(found["offsets"])]
        return ids, ends

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """SentencePiece's text, which shows an unknown token as U+2047; without skipping, that is its own text, too."""
        spelled = self.added.keys() if skip_special_tokens else self.added.keys() | self.special
        shown = [index for index in ids if self.id_to_token(index) is not None]
        if skip_special_tokens:
            shown = [index for index in shown if index == self.unknown or index not in self.special]
        text = "".join(
            "".join(self.id_to_token(index) or "" for index in run) if spell else self.verbatim.decode(list(run))
            for spell, run in groupby(shown, key=lambda index: index in spelled)
        )
        has_prefix = shown and shown[0] not in spelled and self.texts[shown[0]].startswith(SPACE)
        return text[1:] if self.drops_prefix and has_prefix else text

    def token_to_id(self, token: str) -> int | None:
        if token in self.ids:
            return self.ids[token]
        token_id: int = self.pieces.piece_to_id(token)
        return token_id if self.texts[token_id] == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self.added:
            return self.added[token_id]
        return self.texts[token_id] if 0 <= token_id < len(self.texts) else None

    def to_json(self) -> str | None:
        return None

    def _parts(self, text: str) -> Iterator[tuple[str, SentencePieceProcessor | None, tuple[int, int]]]:
        """The parts of `text` in order, what encodes each (None: it is a token), and its place in `text`."""
        start = 0
        processor = self.pieces
        for match in self.pattern.finditer(text):
            token, (stop, end) = match[0], match.span()
            if token in self.swallows_left:
                stop = start + len(text[start:stop].rstrip())
            if token in self.swallows_right:
                end = WHITE_SPACE.match(text, end).end()  # type: ignore[union-attr]
            if start < stop:
                yield text[start:stop], processor, (start, stop)
            yield token, None, (stop, end)
            start, processor = end, self.behind_tokens
        if start < len(text):
            yield text[start:], processor, (start, len(text))


def load_sentencepiece(path: Path, data: bytes, settings: TokenSettings) -> SentencePieceBackend:
    """The tokenizer in `data`, the content of `path`, with the tokens of the settings.

    Raw text gets a BOS, where the model has one, and no EOS, unless the settings say otherwise. Raises UserError when
    the file is neither a SentencePiece model nor whole.
    """
    try:
        pieces = _processor(data)
        size: int = pieces.get_piece_size()
        texts: tuple[str, ...] = tuple(pieces.id_to_piece(list(range(size))))
        own = {texts[index]: index for index in range(size) if pieces.is_control(index) or pieces.is_unknown(index)}
        later = pieces if settings.legacy else _processor(data + WITHOUT_PREFIX)
        verbatim = _processor(data + VERBATIM)
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"it is neither a whole SentencePiece model nor tiktoken's lines of tokens and ranks: {error}"
        raise UserError(f"{path} is not a tokenizer file: {reason}", param="model") from error
    tokens = _added_tokens(texts, settings)
    ids = own | {token.content: index for index, token in tokens.items()}
    special = {index for index, token in tokens.items() if token.special} | set(own.values())
    return SentencePieceBackend(
        pieces=pieces,
        behind_tokens=later,
        verbatim=verbatim,
        drops_prefix=any(
            pieces.decode([i]) != verbatim.decode([i]) for i, text in enumerate(texts) if text.startswith(SPACE)
        ),
        texts=texts,
        added={index: token.content for index, token in tokens.items() if own.get(token.content) != index},
        ids=ids,
        special=frozenset(special),
        unknown=pieces.unk_id(),
        pattern=_pattern([*(AddedToken(text) for text in own), *tokens.values()]),
        swallows_left=frozenset(token.content for token in tokens.values() if token.lstrip),
        swallows_right=frozenset(token.content for token in tokens.values() if token.rstrip),
        prefix=_around(settings.add_bos is not False, settings, ids, "bos_token", pieces.bos_id()),
        suffix=_around(settings.add_eos is True, settings, ids, "eos_token", pieces.eos_id()),
    )


def own_names(backend: SentencePieceBackend) -> dict[str, str]:
    """The names of the special tokens that the model itself has."""
    pieces = backend.pieces
    named = {
        "bos_token": pieces.bos_id(),
        "eos_token": pieces.eos_id(),
        "unk_token": pieces.unk_id(),
        "pad_token": pieces.pad_id(),
    }
    return {name: backend.texts[index] for name, index in named.items() if index >= 0}


def _processor(data: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.load_from_serialized_proto(data)
    return processor


def _added_tokens(texts: tuple[str, ...], settings: TokenSettings) -> dict[int, AddedToken]:
    """By id: those with an id of their own, and behind all others those special ones that nothing else has."""
    known = {text: index for index, text in enumerate(texts)}
    tokens = dict(settings.listed) | dict(settings.declared)
    known |= {token.content: index for index, token in tokens.items()}
    for token in settings.special:
        index = known.setdefault(token.content, max([len(texts) - 1, *tokens]) + 1)
        tokens.setdefault(index, token)
        tokens[index].special = True
    if bad := [index for index in tokens if index < 0]:
        raise UserError(f"added tokens: {tokens[bad[0]].content!r} has the id {bad[0]}; ids begin at 0", param="model")
    return tokens


def _around(wanted: bool, settings: TokenSettings, ids: Mapping[str, int], name: str, own_id: int) -> tuple[int, ...]:
    """The token that stands before or behind raw text, if it is wanted and the model has one."""
    index = ids[settings.named[name].content] if name in settings.named else own_id
    return (index,) if wanted and index >= 0 else ()


def _pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Finds the longest token first."""
    longest = sorted((token for token in tokens if token.content), key=lambda token: len(token.content), reverse=True)
    if not longest:
        return re.compile("(?!)")
    # looking for the first characters alone makes the search through other text ten times as fast
    first = "".join(sorted({re.escape(token.content[0]) for token in longest}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(_token_pattern, longest))})")


def _token_pattern(token: AddedToken) -> str:
    escaped = re.escape(token.content)
    return rf"(?<!\w){escaped}(?!\w)" if token.single_word else escaped


def _ends(offsets: Sequence[tuple[int, int]]) -> list[int]:
    ends = [end for _, end in offsets]
    for index in range(len(ends) - 2, -1, -1):
        if offsets[index][0] == ends[index]:
            ends[index] = ends[index + 1]
    return ends
