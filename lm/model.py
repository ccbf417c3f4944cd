"""The decoder-only transformer, one forward for training and for decoding, with Hugging Face's parameter names.

Knows nothing of requests, sampling or losses. No shape depends on data and nothing waits for the device.
Legend: B rows, T tokens a row, W hidden size, V vocabulary, H query heads, KVH key/value heads, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.cache import PagedBatch
from lm.config import ModelConfig
from lm.ops import AttentionPlan, Ops
from lm.rope import LinearRope, LlamaRope, YarnRope

Rotation = tuple[Tensor, Tensor]
LayerCache = tuple[Tensor, Tensor, AttentionPlan]


class RMSNorm(nn.Module):
    def __init__(self, size: int, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = config.rms_norm_eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.ops = ops
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, key_value_size, bias=bias)
        self.v_proj = nn.Linear(hidden, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, ops) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)  # (B, T, heads, D)
        query, key, value = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.ops.apply_rope(query, key, *rotation)
        if cache is None:
            attended = self.ops.causal_attention(query, key, value, mask)
        else:
            self.ops.write_kv(key, value, *cache)
            attended = self.ops.paged_attention(query, *cache)
        return self.o_proj(attended.reshape(*x.shape[:2], -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.self_attn = Attention(config, ops)
        self.mlp = MLP(config, ops)
        self.input_layernorm = RMSNorm(config.hidden_size, config, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config, ops)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class DecoderModel(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config, ops)


class CausalLM(nn.Module):
    """Every family of `lm.config.FAMILIES`: they differ in what the config says. Build it with `build_model`."""

    def __init__(self, config: ModelConfig, ops: Ops, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.checkpoint_activations = False
        """Recompute layers in the backward pass instead of keeping their activations."""
        self.checkpoint_interval = 1
        """Which of them: the first, and from there every so many-th."""
        self.model = DecoderModel(config, ops)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Not a buffer: a cast of the model must not round it
        self.inverse_frequencies = inverse_frequencies(config).to(device)
        scaling = config.rope_scaling
        self.attention_factor = scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        paged: PagedBatch | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Final-normed hidden states (B, T, W) of tokens (B, T) at positions (B, T).

        Without `paged` each row is one sequence from its first token, padded on the right if at all, or several:
        `documents` (B, T) then numbers the document of each token, whose positions begin anew, and a token sees its
        own document only. With `paged` the tokens are appended to the cache and attend to what their rows have there;
        that form has no gradient and takes no documents.
        """
        x = self.model.embed_tokens(input_ids)
        rotation = self._rotation(positions)
        if paged is not None:
            return self._decode(x, rotation, positions, paged)
        masks = self._masks(input_ids, documents)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for index, (layer, mask) in enumerate(zip(self.model.layers, masks, strict=True)):
            if recompute and index % self.checkpoint_interval == 0:
                x = checkpoint(layer, x, rotation, mask, use_reentrant=False)
            else:
                x = layer(x, rotation, mask)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def _decode(self, x: Tensor, rotation: Rotation, positions: Tensor, paged: PagedBatch) -> Tensor:
        windows = self._windows(paged.block_table.shape[1] * paged.cache.block_size)
        plans = {window: self.ops.plan_attention(paged, positions, window) for window in dict.fromkeys(windows)}
        stored = zip(self.model.layers, windows, paged.cache.keys, paged.cache.values, strict=True)
        for layer, window, keys, values in stored:
            x = layer(x, rotation, None, (keys, values, plans[window]))
        return self.model.norm(x)  # type: ignore[no-any-return]

    def _masks(self, input_ids: Tensor, documents: Tensor | None) -> list[Tensor | None]:
        """One per layer, made once for each window; None where a token sees all before it."""
        windows = self._windows(input_ids.shape[1])
        masks = {
            window: None if window is None and documents is None else self.ops.causal_mask(input_ids, documents, window)
            for window in dict.fromkeys(windows)
        }
        return [masks[window] for window in windows]

    def _windows(self, num_keys: int) -> list[int | None]:
        """The window of each layer; None, too, where so many keys all lie within it."""
        return [window if window and window < num_keys else None for window in self.config.sliding_windows]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., W) -> (..., V)."""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """(V, W): the matrix behind `logits`, for losses that do not want all logits at once."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def _rotation(self, positions: Tensor) -> Rotation:
        """Cosine and sine (B, T, 1, D) in fp32, the sine's first half negated as `apply_rope` wants it."""
        angles = positions[:, :, None, None].float() * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def build_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, ops: Ops) -> CausalLM:
    """The model with uninitialised weights in `dtype` on `device`; loading a checkpoint fills them."""
    with torch.device("meta"):
        model = CausalLM(config, ops, device)
    return model.to(dtype).to_empty(device=device)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(D / 2,) angles per position, in fp32 (Su et al., 2021), stretched as the config says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor=factor):
            return frequencies / factor
        case LlamaRope() as scaling:
            return _stretch_llama3(frequencies, scaling)
        case YarnRope() as scaling:
            return _stretch_yarn(frequencies, scaling, config.rope_theta)


def _stretch_llama3(frequencies: Tensor, scaling: LlamaRope) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a linear passage between (Llama 3.1)."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    turns = original * frequencies / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _stretch_yarn(frequencies: Tensor, scaling: YarnRope, theta: float) -> Tensor:
    """As Llama 3.1's, but the passage is linear in the dimension (Peng et al., 2023)."""
    last = 2 * len(frequencies) - 1
    first, end = (_dimension(turns, scaling, theta, last + 1) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, end = math.floor(first), math.ceil(end)
    first, end = max(first, 0), min(end, last)
    index = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    divide = ((index - first) / (end - first or 0.001)).clamp(0, 1)  # where both meet, a step
    return divide * frequencies / scaling.factor + (1 - divide) * frequencies


def _dimension(turns: float, scaling: YarnRope, theta: float, head_dim: int) -> float:
    """Index of the frequency that makes so many turns within the original context."""
    length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(length) / (2 * math.log(theta))
