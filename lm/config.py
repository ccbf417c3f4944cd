"""The architecture of a model, as its Hugging Face `config.json` or Meta's `params.json` says it. Torch-free.

Where a key is missing, the value is the default of the family's config class in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lm.config_fields import Fields, read_json_object
from lm.errors import NotFoundError, UserError
from lm.meta_params import PARAMS_FILE, hf_config
from lm.rope import RopeScaling, read_rope

CONFIG_FILE = "config.json"
SUPPORTED_ACTIVATIONS = ("silu",)
MAX_LAYERS = 1024
LAYER_TYPES = ("full_attention", "sliding_attention")

Rule = Literal["never", "always", "by key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one `model_type` have, and what its config says where it says nothing."""

    defaults: Mapping[str, Any]
    attention_bias: Rule
    """Of q, k and v; `by key`: as the config's `attention_bias` says."""
    attention_output_bias: Rule
    mlp_bias: Rule
    qk_norm: bool
    """Each query and key head is normed before it is rotated."""
    windows: Literal["none", "all layers", "by layer"]
    """Which layers look at the last `sliding_window` tokens only."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        attention_bias="by key",
        attention_output_bias="by key",
        mlp_bias="by key",
        qk_norm=False,
        windows="none",
    ),
    "mistral": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        attention_bias="never",
        attention_output_bias="never",
        mlp_bias="never",
        qk_norm=False,
        windows="all layers",
    ),
    "qwen2": Family(
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        attention_bias="always",
        attention_output_bias="never",
        mlp_bias="never",
        qk_norm=False,
        windows="by layer",
    ),
    "qwen3": Family(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        attention_bias="by key",
        attention_output_bias="by key",
        mlp_bias="never",
        qk_norm=True,
        windows="by layer",
    ),
}
SUPPORTED_FAMILIES = tuple(FAMILIES)
NULL_MEANS_NONE = ("sliding_window", "num_key_value_heads", "bos_token_id", "eos_token_id")
"""A null of the other keys is read as if the key were missing."""


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
    """Of the projections to queries, keys and values."""
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Each query and key head is normed before it is rotated."""
    sliding_windows: tuple[int | None, ...]
    """Per layer: how many tokens a token sees, itself included; None is all."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    """Transformers trains no input embedding of this token, and so do we. In many models it is the end token, too."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Check and read the contents of a `config.json`. Raises UserError naming the key, its value and the mend."""
        Fields(data).one_of("model_type", SUPPORTED_FAMILIES, None)
        family = FAMILIES[data["model_type"]]
        said = {key: value for key, value in data.items() if value is not None or key in NULL_MEANS_NONE}
        fields = Fields({**family.defaults, **said})
        _refuse_unreadable(fields)
        hidden_size = fields.size("hidden_size")
        num_heads = fields.size("num_attention_heads")
        longest = fields.size("max_position_embeddings")
        rope_theta, rope_scaling = read_rope(fields.data, longest)
        config = cls(
            model_type=data["model_type"],
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_hidden_layers=_num_layers(fields),
            num_attention_heads=num_heads,
            num_key_value_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=longest,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=_has(fields, family.attention_bias, "attention_bias"),
            attention_output_bias=_has(fields, family.attention_output_bias, "attention_bias"),
            mlp_bias=_has(fields, family.mlp_bias, "mlp_bias"),
            qk_norm=family.qk_norm,
            sliding_windows=_windows(fields, family),
            bos_token_id=fields.token_id("bos_token_id"),
            eos_token_ids=fields.token_ids("eos_token_id"),
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
            attention += query + 2 * key_value
        attention += hidden if self.attention_output_bias else 0
        attention += 2 * self.head_dim if self.qk_norm else 0
        mlp = 3 * hidden * inner + (2 * inner + hidden if self.mlp_bias else 0)
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in the KV cache, all layers together."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


def load_config(folder: Path) -> ModelConfig:
    """Read the config, and the end-of-sequence ids of `generation_config.json` where there is one.

    Raises NotFoundError when there is no such folder, UserError when its files are missing or wrong.
    """
    path = _config_path(folder)
    data = _read(path)
    with _naming(path):
        config = ModelConfig.from_dict(data)
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    with _naming(generation):
        extra = Fields(read_json_object(generation)).token_ids("eos_token_id")
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))


def read_hf_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds; where there is only Meta's `params.json`, the config that Hugging Face has for it.

    Raises as `load_config` does, but does not check the values of a `config.json`.
    """
    return _read(_config_path(folder))


def _config_path(folder: Path) -> Path:
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}")
    candidates = (folder / CONFIG_FILE, folder / PARAMS_FILE, folder / "original" / PARAMS_FILE)
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{folder} is not a model: it has no config.json (Hugging Face), nor Meta's params.json")


def _read(path: Path) -> dict[str, Any]:
    data = read_json_object(path)
    if path.name == CONFIG_FILE:
        return data
    with _naming(path):
        return hf_config(data)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the mistakes that are found in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}", param=error.param) from error


def _refuse_unreadable(fields: Fields) -> None:
    fields.one_of("hidden_act", SUPPORTED_ACTIVATIONS, "silu")
    if "quantization_config" in fields.data:
        raise UserError(
            "quantization_config: quantised weights cannot be read; use the model's unquantised checkpoint",
            param="quantization_config",
        )


def _num_layers(fields: Fields) -> int:
    """Bounded, so that a config from anywhere cannot keep us busy."""
    number = fields.size("num_hidden_layers")
    if number > MAX_LAYERS:
        raise fields.wrong("num_hidden_layers", f"at most {MAX_LAYERS}")
    return number


def _has(fields: Fields, rule: Rule, key: str) -> bool:
    return rule == "always" or (rule == "by key" and fields.flag(key))


def _windows(fields: Fields, family: Family) -> tuple[int | None, ...]:
    """The window of each layer, as transformers' config classes of the family derive it."""
    layers = _num_layers(fields)
    if family.windows == "none":
        return (None,) * layers
    is_off = family.windows == "by layer" and not fields.flag("use_sliding_window")
    window = None if is_off or fields.data.get("sliding_window") is None else fields.size("sliding_window")
    first = 0 if family.windows == "all layers" else fields.count("max_window_layers")
    derived = tuple(window if index >= first else None for index in range(layers))
    return derived if "layer_types" not in fields.data else _windows_by_type(fields, family, layers, window)


def _windows_by_type(fields: Fields, family: Family, layers: int, window: int | None) -> tuple[int | None, ...]:
    types = fields.data["layer_types"]
    if not isinstance(types, list) or len(types) != layers or not all(kind in LAYER_TYPES for kind in types):
        raise fields.wrong("layer_types", f"a list of {layers} names, each one of {list(LAYER_TYPES)}")
    if window is None and "sliding_attention" in types:
        raise fields.wrong("layer_types", "full_attention throughout, since there is no sliding window")
    if window is not None and family.windows == "all layers" and "full_attention" in types:
        raise fields.wrong("layer_types", "sliding_attention throughout: in this family all layers have the window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _pad_token_id(fields: Fields) -> int | None:
    """Negative ones, as in the first llamas, count from the end of the vocabulary."""
    value, size = fields.data.get("pad_token_id"), fields.size("vocab_size")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and -size <= value < size):
        return value
    raise fields.wrong("pad_token_id", f"a token id below vocab_size = {size}, or null")


def _check_heads(config: ModelConfig) -> None:
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % key_value_heads:
        raise UserError(
            f"num_key_value_heads: must divide num_attention_heads = {heads} (got {key_value_heads})",
            param="num_key_value_heads",
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim: must be even for rotary embeddings (got {config.head_dim})", param="head_dim")
