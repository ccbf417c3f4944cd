"""A tokenizer as the metadata of a GGUF file: the way back of lm/gguf_tokenizer.py. Torch-free.

GGUF says by a name how text is cut into words, so only tokenizers can be written whose way has a name. What is written
is read back and tried on a text in which the ways differ, before anybody relies on it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from lm.errors import UserError
from lm.gguf_tokenizer import (
    BYTE_TOKEN,
    CONTROL_TOKEN,
    NORMAL_TOKEN,
    PRE_TOKENIZERS,
    SENTENCEPIECE_BPE,
    UNKNOWN_TOKEN,
    UNUSED_TOKEN,
    USER_DEFINED_TOKEN,
    build_tokenizer,
    sentencepiece_model,
)
from lm.sentencepiece_backend import SPACE, SentencePieceBackend
from lm.tokenizer import Tokenizer
from lm.tokenizers_backend import TokenizersBackend

Metadata = dict[str, Any]
Token = tuple[str, int, float]
"""Text, type and score."""

PROBE = (
    "Hello, world! It's 3 o'clock; we'll see 12345 things...   \n\n\tdef f(x):\n    return x**2 + 1_000\r\n"
    "ÄÖÜ éè naïve Ελλάδα Привет, мир! 你好,世界。 こんにちは 안녕하세요 🙂👍🏽 don't I'M they'VE $5.99 (a+b)=c^2 ~~ <|x|> e\u0301\n  \n x"
)
NAMED = {"unknown": "unk_token", "padding": "pad_token"}


def tokenizer_metadata(tokenizer: Tokenizer, num_rows: int) -> Metadata:
    """Everything under `tokenizer.ggml.` for a model whose embedding has `num_rows` rows.

    Raises UserError for a tokenizer that no GGUF file can describe.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        metadata = _of_sentencepiece(backend, num_rows)
    elif isinstance(backend, TokenizersBackend):
        metadata = _of_tokenizer_json(backend, num_rows)
    else:
        raise _unsupported(f"a tokenizer of the kind {type(backend).__name__}")
    return {**metadata, **_special(tokenizer)}


def _of_tokenizer_json(backend: TokenizersBackend, num_rows: int) -> Metadata:
    data = json.loads(backend.inner.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"a {model['type']} tokenizer")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        return _checked_pieces(_pieces_of_merges(backend, merges), backend, num_rows)
    tokens = _padded(_bpe_tokens(backend), num_rows)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [text for text, _, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind, _ in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
    return {**metadata, "tokenizer.ggml.pre": _name_of_words(metadata, backend.inner, data["pre_tokenizer"])}


def _name_of_words(metadata: Metadata, original: tokenizers.Tokenizer, pre_tokenizer: Any) -> str:
    """The name under which the tokenizer cuts text as it does here; that of the same construction first."""
    expected = original.encode(PROBE, add_special_tokens=False).ids
    found = []
    for name in PRE_TOKENIZERS:
        rebuilt = build_tokenizer({**metadata, "tokenizer.ggml.pre": name})
        if rebuilt.encode(PROBE, add_special_tokens=False).ids == expected:
            is_same = json.loads(rebuilt.to_str())["pre_tokenizer"] == pre_tokenizer
            found.append((not is_same, name))
    if not found:
        raise _unsupported(f"a tokenizer that cuts text into words unlike {', '.join(PRE_TOKENIZERS)}")
    return min(found, key=lambda pair: pair[0])[1]


def _bpe_tokens(backend: TokenizersBackend) -> dict[int, Token]:
    vocab = backend.inner.get_vocab(with_added_tokens=True)
    added = {index: token.special for index, token in backend.inner.get_added_tokens_decoder().items()}

    def kind(index: int) -> int:
        if index not in added:
            return NORMAL_TOKEN
        return CONTROL_TOKEN if added[index] else USER_DEFINED_TOKEN

    return {index: (text, kind(index), 0.0) for text, index in vocab.items()}


def _pieces_of_merges(backend: TokenizersBackend, merges: list[list[str]]) -> dict[int, Token]:
    """Llama 2's tokenizer.json as SentencePiece's pieces: what is merged earlier has the higher score."""
    unknown = json.loads(backend.inner.to_str())["model"].get("unk_token")
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge), -float(rank))
    pieces = {}
    for index, (text, kind, _) in _bpe_tokens(backend).items():
        if text == unknown:
            kind = UNKNOWN_TOKEN
        elif kind == NORMAL_TOKEN and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE_TOKEN
        pieces[index] = (text, kind, scores.get(text, -float(len(merges)) if kind == NORMAL_TOKEN else 0.0))
    return pieces


def _of_sentencepiece(backend: SentencePieceBackend, num_rows: int) -> Metadata:
    model = list(_fields(backend.pieces.serialized_model_proto()))
    trainer = dict(field for number, value in model if number == 2 for field in _fields(value))
    if trainer.get(3, 1) != SENTENCEPIECE_BPE:
        raise _unsupported("a SentencePiece tokenizer that is no BPE")
    pieces: dict[int, Token] = {}
    for number, value in model:
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces[len(pieces)] = (piece[1].decode(), piece.get(3, NORMAL_TOKEN), score)
    for index, text in backend.added.items():
        kind = CONTROL_TOKEN if index in backend.special else USER_DEFINED_TOKEN
        if index not in pieces or pieces[index][1] == NORMAL_TOKEN:
            pieces[index] = (text, kind, 0.0)
    return _checked_pieces(pieces, backend, num_rows)


def _checked_pieces(
    pieces: Mapping[int, Token], backend: SentencePieceBackend | TokenizersBackend, num_rows: int
) -> Metadata:
    tokens = _padded(pieces, num_rows)
    first = backend.encode("a", add_special_tokens=False)[0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text for text, _, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind, _ in tokens],
        "tokenizer.ggml.scores": [score for _, _, score in tokens],
        "tokenizer.ggml.add_space_prefix": tokens[first][0].startswith(SPACE),
    }
    rebuilt = SentencePieceProcessor()
    rebuilt.load_from_serialized_proto(sentencepiece_model(metadata))
    if rebuilt.encode_as_ids(PROBE) != backend.encode(PROBE, add_special_tokens=False):
        raise _unsupported("a SentencePiece tokenizer that changes text before it cuts it")
    return metadata


def _padded(tokens: Mapping[int, Token], num_rows: int) -> list[Token]:
    """One for each row of the embedding, as llama.cpp wants it."""
    return [tokens.get(index, (f"[PAD{index}]", UNUSED_TOKEN, 0.0)) for index in range(num_rows)]


def _special(tokenizer: Tokenizer) -> Metadata:
    """Ids of the named tokens, and what is put around raw text."""
    plain, wrapped = (tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    ends = tokenizer.eos_token_ids
    ids: dict[str, int | None] = {"bos": tokenizer.bos_token_id, **dict(zip(("eos", "eot", "eom"), ends, strict=False))}
    for key, name in NAMED.items():
        token = tokenizer.special_tokens.get(name)
        ids[key] = None if token is None else tokenizer.backend.token_to_id(token)
    return {
        **{f"tokenizer.ggml.{key}_token_id": index for key, index in ids.items() if index is not None},
        "tokenizer.ggml.add_bos_token": wrapped != plain and wrapped[:1] == [tokenizer.bos_token_id],
        "tokenizer.ggml.add_eos_token": wrapped != plain and wrapped[-1:] == list(ends[:1]),
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message: integers, and bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        sizes: dict[int, Callable[[], int]] = {1: lambda: 8, 2: varint, 5: lambda: 4}
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = sizes[key & 7]()
            yield key >> 3, message[at : at + size]
            at += size


def _unsupported(what: str) -> UserError:
    return UserError(f"the model has {what}, for which GGUF has no name that is known here; it cannot be exported")
