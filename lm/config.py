"""The architecture of a model, as its Hugging Face `config.json` says it. Torch-free.

Both spellings are read: transformers v4 (`rope_theta`, `rope_scaling`) and v5 (`rope_parameters`). Where a key is
missing, the value is the default of transformers' LlamaConfig.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.errors import NotFoundError, UserError

SUPPORTED_FAMILIES = ("llama",)
SUPPORTED_ACTIVATIONS = ("silu",)
SUPPORTED_ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies past the context the model was pre-trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Hugging Face's names and meanings. Build it with `from_dict` or `load_config`, which check it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    """Transformers trains no input embedding of this token, and so do we. In many models it is the end token, too."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Check and read the contents of a `config.json`. Raises UserError naming the key, its value and the mend."""
        fields = _Fields(data)
        fields.one_of("model_type", SUPPORTED_FAMILIES, None)
        fields.one_of("hidden_act", SUPPORTED_ACTIVATIONS, "silu")
        if data.get("quantization_config") is not None:
            raise UserError(
                "quantization_config: quantised weights cannot be read; use the model's unquantised checkpoint",
                param="quantization_config",
            )
        hidden_size = fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        rope_theta, rope_scaling = _rope(fields)
        config = cls(
            model_type=data["model_type"],
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_hidden_layers=fields.size("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            bos_token_id=_bos_token_id(data.get("bos_token_id", 1)),
            eos_token_ids=_eos_token_ids(data.get("eos_token_id", 2)),
            pad_token_id=_pad_token_id(fields),
        )
        _check_heads(config)
        return config

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the whole model; a tied embedding counts once."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = 2 * hidden * query + 2 * hidden * key_value
        if self.attention_bias:
            attention += query + 2 * key_value + hidden
        mlp = 3 * hidden * inner + (2 * inner + hidden if self.mlp_bias else 0)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in the KV cache, all layers together."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`, and the end-of-sequence ids of `generation_config.json` where there is one.

    Raises NotFoundError when there is no such folder, UserError when its files are missing or wrong.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model in Hugging Face format: it has no config.json")
    try:
        config = ModelConfig.from_dict(_read_json(path))
    except UserError as error:
        raise UserError(f"{path}: {error}", param=error.param) from error
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    extra = _eos_token_ids(_read_json(generation).get("eos_token_id"))
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed, checked access to a JSON object; `prefix` stands before a key in messages."""

    data: Mapping[str, Any]
    prefix: str = ""

    def wrong(self, key: str, wanted: str) -> UserError:
        name = self.prefix + key
        if key not in self.data:
            return UserError(f"{name}: this key is required and missing; it must be {wanted}", param=name)
        return UserError(f"{name}: must be {wanted} (got {self.data[key]!r})", param=name)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None) -> str:
        value = self._value(key, default)
        if value not in allowed:
            raise self.wrong(key, f"one of the supported {list(allowed)}")
        return str(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        return default if value is None else value


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: from `rope_parameters` (v5), else from `rope_theta` and `rope_scaling` (v4)."""
    name = "rope_parameters" if fields.data.get("rope_parameters") is not None else "rope_scaling"
    data = fields.data.get(name)
    if data is None:
        return fields.number("rope_theta", 10000.0), None
    if not isinstance(data, dict):
        raise fields.wrong(name, "an object")
    rope = _Fields(data, f"{name}.")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.one_of("rope_type" if "rope_type" in data else "type", SUPPORTED_ROPE_TYPES, "default")
    return theta, None if kind == "default" else _llama3(rope)


def _llama3(rope: _Fields) -> RopeScaling:
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.wrong("high_freq_factor", f"more than low_freq_factor = {scaling.low_freq_factor}")
    return scaling


def _bos_token_id(value: Any) -> int | None:
    if value is None or _is_token_id(value):
        return value  # type: ignore[no-any-return]
    raise UserError(f"bos_token_id: must be a token id or null (got {value!r})", param="bos_token_id")


def _pad_token_id(fields: _Fields) -> int | None:
    """Negative ones, as in the first llamas, count from the end of the vocabulary."""
    value, size = fields.data.get("pad_token_id"), fields.size("vocab_size")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -size <= value < size):
        return value
    raise fields.wrong("pad_token_id", f"a token id below vocab_size = {size}, or null")


def _eos_token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_token_id(id_) for id_ in ids):
        raise UserError(
            f"eos_token_id: must be a token id, a list of them or null (got {value!r})", param="eos_token_id"
        )
    return tuple(dict.fromkeys(ids))


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_heads(config: ModelConfig) -> None:
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % key_value_heads:
        raise UserError(
            f"num_key_value_heads: must divide num_attention_heads = {heads} (got {key_value_heads})",
            param="num_key_value_heads",
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim: must be even for rotary embeddings (got {config.head_dim})", param="head_dim")
