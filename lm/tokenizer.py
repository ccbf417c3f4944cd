"""Text to token ids and back, from a model folder's `tokenizer.json`. Torch-free.

Ids equal those of transformers' `AutoTokenizer` on the same folder, special tokens inside the text included: the
tokens that tokenizer_config.json and special_tokens_map.json name are added to those of tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from lm.errors import NotFoundError, UserError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with the special tokens of its model. Safe to use from several threads."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `pad_token` ... -> the token's text; those the model lacks are absent."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the tokenizer's own first."""
    vocab_size: int
    """Number of tokens, added ones included. The model's embedding may have more rows."""

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds what the model wants around raw text, such as a BOS.

        Special tokens that are spelled out in `text` become their ids. Raises UserError for text that is not
        Unicode (a lone surrogate).
        """
        ids: list[int] = self._encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """`encode` without added special tokens, and for each token the index in `text` behind its last character.

        Ends never fall; the byte tokens of one character all end behind it. Starts would be of no use here: some
        tokenizers leave the leading space out of them.
        """
        encoding = self._encode(text, add_special_tokens=False)
        return encoding.ids, list(accumulate((end for _, end in encoding.offsets), max))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not whole UTF-8 characters come out as U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        if not text.isascii():
            _check_unicode(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of the Hugging Face folder `folder`.

    Raises NotFoundError when the folder does not exist, UserError when a file is missing or damaged, or when the
    tokenizer has more tokens than the model has embeddings.
    """
    backend = _load_backend(folder)
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
    special_tokens = _add_special_tokens(backend, folder, settings)
    config = read_json(folder / "config.json")
    vocab_size = backend.get_vocab_size(with_added_tokens=True)
    _check_embeddings(folder, backend, config)
    bos_token_ids = _token_ids(backend, special_tokens.get("bos_token"), config.get("bos_token_id"))
    eos_token_ids = _token_ids(
        backend,
        special_tokens.get("eos_token"),
        read_json(folder / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
    )
    return Tokenizer(
        backend=backend,
        special_tokens=special_tokens,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
    )


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", param="model")
    if not path.is_file():
        others = ", ".join(sorted(found.name for found in folder.glob("*.model")))
        instead = f"; it has {others} in another format: save that as tokenizer.json" if others else ""
        raise UserError(f"{folder} has no tokenizer.json{instead}", param="model")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}", param="model") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", param="model") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}", param="model")
    return data


def _add_special_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Add the tokens that the settings know and tokenizer.json does not, in transformers' order; the named ones."""
    try:
        by_id = sorted((int(index), token) for index, token in settings.get("added_tokens_decoder", {}).items())
        declared = [_added_token(token) for _, token in by_id]
        named = {name: token for name in SPECIAL_TOKENS if (token := _special_token(settings.get(name)))}
        special = [*named.values(), *_extra_tokens(settings)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"the special tokens in {folder / 'tokenizer_config.json'} are malformed: {error!r}"
        raise UserError(reason, param="model") from error
    backend.add_tokens(declared)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([token for token in special if token.content not in known])
    return {name: token.content for name, token in named.items()}


def _extra_tokens(settings: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """Special tokens beside the named ones: a list, or since transformers 5 also an object of named tokens."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    return [token for value in values if (token := _special_token(value))]


def _special_token(value: Any) -> tokenizers.AddedToken | None:
    """A special token is written as a string or as an object; null where the model has none."""
    fields = value if isinstance(value, dict) else {"content": value}
    return _added_token({**fields, "special": True}) if isinstance(fields.get("content"), str) else None


def _added_token(fields: dict[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(fields["content"], **{flag: fields[flag] for flag in TOKEN_FLAGS if flag in fields})


def _token_ids(backend: tokenizers.Tokenizer, text: str | None, *configured: Any) -> tuple[int, ...]:
    """Ids of a named token and of `..._token_id` entries (an integer, a list or null), each once."""
    ids = [] if text is None else [backend.token_to_id(text)]
    for entry in configured:
        ids += entry if isinstance(entry, list) else [entry]
    # configs carry ids that no vocabulary has, such as -1 for "none"
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0 and backend.id_to_token(i) is not None))


def _check_embeddings(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """An id without an embedding would be read past the end of the table by the first prompt that spells it."""
    rows = config.get("vocab_size")
    highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if isinstance(rows, int) and highest >= rows:
        token = backend.id_to_token(highest)
        raise UserError(
            f"the tokenizer in {folder} has token {highest} ({token!r}) but vocab_size in config.json is {rows}: "
            "take the tokenizer that belongs to these weights",
            param="model",
        )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send it as UTF-8 or as a \\u pair"
        ) from error
