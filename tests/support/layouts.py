"""The weights of a tiny model in the layouts in which people have them, beside its own config and tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lm.config import ModelConfig, load_config

Tensors = dict[str, Tensor]
META_NAMES = (
    (r"^model\.embed_tokens", "tok_embeddings"),
    (r"^lm_head", "output"),
    (r"^model\.", ""),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
TORCHTUNE_NAMES = (
    *META_NAMES[:3],
    (r"self_attn\.o_proj", "attn.output_proj"),
    (r"self_attn", "attn"),
    (r"gate_proj", "w1"),
    (r"down_proj", "w2"),
    (r"up_proj", "w3"),
    (r"input_layernorm", "sa_norm"),
    (r"post_attention_layernorm", "mlp_norm"),
    (r"norm\.weight$", "norm.scale"),
)


def write_layout(base: Path, folder: Path, layout: str) -> Path:
    """A copy of the tiny model `base` with its weights in another layout, and no safetensors."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    LAYOUTS[layout](folder, tensors, load_config(base))
    return folder


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows as Meta has them: of each head 0, D / 2, 1, D / 2 + 1 ... of Hugging Face's."""
    size = weight.shape[0] // heads
    rows = [head * size + row for head in range(heads) for pair in range(size // 2) for row in (pair, pair + size // 2)]
    return weight[rows]


def renamed(tensors: Tensors, names: Iterable[tuple[str, str]], config: ModelConfig, *, interleave: bool) -> Tensors:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    result = {}
    for name, tensor in tensors.items():
        layer = name.split(".")[-2]
        value = interleaved(tensor, heads[layer]) if interleave and layer in heads else tensor
        for pattern, text in names:
            name = re.sub(pattern, text, name)
        result[name] = value
    return result


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    return tuple({name: tensors[name] for name in part} for part in (names[::2], names[1::2]))  # type: ignore[return-value]


def _single(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _indexed(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    weight_map: dict[str, str] = {}
    for number, part in enumerate(halves(tensors), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    for number, part in enumerate(halves(tensors), start=1):
        torch.save(part, folder / f"pytorch_model-{number:05}-of-00002.bin")


def _ft_model(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    for number, part in enumerate(halves(tensors), start=1):
        torch.save(part, folder / f"ft-model-{number:05}-of-00002.bin")


def _hf_model(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    """Three epochs, of which the last one counts; 10 is after 9, not after 1."""
    for epoch in (8, 9, 10):
        for number, part in enumerate(halves(tensors), start=1):
            values = {name: tensor + (10 - epoch) for name, tensor in part.items()}
            torch.save(values, folder / f"hf_model_{number:04}_{epoch}.pt")


def _meta(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    values = renamed(tensors, META_NAMES, config, interleave=True)
    torch.save(values | {"rope.freqs": torch.ones(config.head_dim // 2)}, folder / "consolidated.00.pth")


def _meta_in_original(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    (folder / "original").mkdir()
    _meta(folder / "original", tensors, config)


def _meta_model(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    torch.save(renamed(tensors, META_NAMES, config, interleave=True), folder / "meta_model_0.pt")


def _torchtune_model(folder: Path, tensors: Tensors, config: ModelConfig) -> None:
    interleave = config.model_type in ("llama", "mistral")
    torch.save(renamed(tensors, TORCHTUNE_NAMES, config, interleave=interleave), folder / "torchtune_model_0.pt")


LAYOUTS: dict[str, Callable[[Path, Tensors, ModelConfig], None]] = {
    "pytorch_model.bin": _single,
    "pytorch_model.bin.index.json": _indexed,
    "pytorch_model-0000N.bin": _shards,
    "ft-model.bin": _ft_model,
    "hf_model.pt": _hf_model,
    "consolidated.00.pth": _meta,
    "original/consolidated.00.pth": _meta_in_original,
    "meta_model.pt": _meta_model,
    "torchtune_model.pt": _torchtune_model,
}
