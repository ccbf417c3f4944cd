"""What the JSON files beside a tokenizer say about its special and added tokens. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lm.errors import UserError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """Of tokenizer_config.json, and where that declares no tokens, of special_tokens_map.json and added_tokens.json."""

    declared: Mapping[int, AddedToken]
    """Tokens by the id that they are declared with (`added_tokens_decoder`), in the order of the ids."""
    listed: Mapping[int, AddedToken]
    """Those of added_tokens.json, which tokenizer.json repeats and tokenizer.model does not."""
    named: Mapping[str, AddedToken]
    """`bos_token` ... -> the token; names without one are absent."""
    extra: tuple[AddedToken, ...]
    """Special tokens without a name or an id."""
    add_bos: bool | None
    add_eos: bool | None
    """Whether raw text gets them; None where the file leaves it to the tokenizer."""
    legacy: bool
    """SentencePiece: a prefix space behind special tokens too, as in the models up to Llama 2."""

    @property
    def special(self) -> tuple[AddedToken, ...]:
        return (*self.named.values(), *self.extra)


def read_settings(folder: Path) -> TokenSettings:
    """Raises UserError naming the file that is damaged or whose tokens are malformed."""
    settings = read_json(folder / "tokenizer_config.json")
    listed: dict[str, Any] = {}
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
        listed = read_json(folder / "added_tokens.json")
    try:
        return _read(settings, listed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"the special tokens in {folder / 'tokenizer_config.json'} are malformed: {error!r}"
        raise UserError(reason, param="model") from error


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


def _read(settings: dict[str, Any], listed: dict[str, Any]) -> TokenSettings:
    declared = {int(index): _added_token(token) for index, token in settings.get("added_tokens_decoder", {}).items()}
    return TokenSettings(
        declared=dict(sorted(declared.items())),
        listed={int(index): AddedToken(content, normalized=False) for content, index in listed.items()},
        named={name: token for name in SPECIAL_TOKENS if (token := _special_token(settings.get(name)))},
        extra=tuple(_extra_tokens(settings)),
        add_bos=_flag(settings, "add_bos_token"),
        add_eos=_flag(settings, "add_eos_token"),
        legacy=_flag(settings, "legacy") is not False,
    )


def _extra_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """Special tokens beside the named ones: a list, or since transformers 5 also an object of named tokens."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    return [token for value in values if (token := _special_token(value))]


def _special_token(value: Any) -> AddedToken | None:
    """A special token is written as a string or as an object; null where the model has none."""
    fields = value if isinstance(value, dict) else {"content": value}
    return _added_token({**fields, "special": True}) if isinstance(fields.get("content"), str) else None


def _added_token(fields: dict[str, Any]) -> AddedToken:
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in TOKEN_FLAGS if flag in fields})


def _flag(settings: dict[str, Any], name: str) -> bool | None:
    value = settings.get(name)
    return value if isinstance(value, bool) else None
