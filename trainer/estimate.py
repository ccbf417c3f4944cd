"""What a run will take, from its options and the model's shape alone: memory on the device, bytes on the disk,
floating-point operations. Torch-free.

Memory is that of tensors, at the moment where it is highest. What a layer keeps for its backward pass was counted on
the model itself (tests/trainer/test_estimate.py counts it again): legend W hidden size, H query heads, KVH key/value
heads, D head dim, I inner size of the MLP, V vocabulary, e bytes of a number in the precision of the products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lm.config import ModelConfig
from trainer.config import TrainingOptions

Precision = Literal["bf16", "fp32"]

BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}
MASTER = 4
"""Bytes of a trained weight and of its gradient: fp32 in both precisions."""
LOGITS_BYTES = 64 << 20
"""As trainer/loss.py bounds a chunk of logits."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that are given the same tensor."""
MAX_SCORES = 1 << 22
"""Up to here attention on a CPU in bf16 keeps its scores."""
OVERHEAD = {"cpu": 450 << 20, "cuda": 600 << 20, "npu": 600 << 20}
"""What a trainer takes before it has a model: its libraries, or the device's own buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the layers keep of one batch for its backward pass."""
    logits: int
    """Loss and output matrix: a chunk of logits, their gradients."""
    overhead: int
    total: int
    """The highest sum at one moment: where nothing is accumulated, gradients come as activations go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEstimate:
    """Bytes in the run folder."""

    checkpoint: int
    """One checkpoint: a model, or an adapter."""
    merged: int
    """The merged model at the end, where an adapter is trained."""
    state: int
    """The training state that a run can be resumed from."""
    total: int
    """All that is there at one moment, at most."""


def estimate_memory(
    config: ModelConfig, options: TrainingOptions, *, precision: Precision, length: int, device: str = "cpu"
) -> MemoryEstimate:
    """For batches whose rows have `length` tokens."""
    trained = trained_parameters(config, options)
    tokens = _rows(options) * length
    weights = _weight_bytes(config, options, precision)
    gradients = MASTER * (_largest_parameter(config, options) if options.optimizer_in_backward else trained)
    optimizer = optimizer_bytes(config, options)
    activations = _activation_bytes(config, options, precision, tokens=tokens, length=length, device=device)
    logits = _loss_bytes(config, options, precision, tokens=tokens)
    overhead = OVERHEAD[device.split(":")[0]] if device.split(":")[0] in OVERHEAD else OVERHEAD["cpu"]
    accumulated = gradients if options.gradient_accumulation_steps > 1 else 0
    highest = max(accumulated + activations + logits, gradients + activations // config.num_hidden_layers)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        overhead=overhead,
        total=weights + optimizer + highest + overhead,
    )


def estimate_disk(
    config: ModelConfig, options: TrainingOptions, *, precision: Precision, num_checkpoints: int
) -> DiskEstimate:
    """For a run that publishes so many checkpoints."""
    trained = trained_parameters(config, options)
    whole = BYTES[precision] * config.num_parameters
    checkpoint = MASTER * trained if options.trains_adapter else whole
    kept = checkpoints_at_once(options, num_checkpoints)
    merged = whole if options.trains_adapter else 0
    state = MASTER * trained + optimizer_bytes(config, options)
    return DiskEstimate(
        checkpoint=checkpoint,
        merged=merged,
        state=state,
        total=kept * checkpoint + merged + 2 * state,  # the old state goes once the new one is whole
    )


def checkpoints_at_once(options: TrainingOptions, num_checkpoints: int) -> int:
    """At most: beside those that are kept the best one stays, and a new one is there before the oldest goes."""
    return min(num_checkpoints, (options.keep_last_n_checkpoints or num_checkpoints) + 2)


def flops_per_token(config: ModelConfig, options: TrainingOptions, *, length: int) -> float:
    """Of one processed token, forward and backward: 6 a weight that is trained, 4 one that only lets gradients through
    (Kaplan et al., 2020), and the products of attention."""
    matrices = config.num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    per_weight = 4 if options.trains_adapter else 6
    per_weight += 2 if options.enable_activation_checkpointing else 0
    attention = 3 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return float(per_weight * matrices + attention)


def trained_parameters(config: ModelConfig, options: TrainingOptions) -> int:
    """Numbers that are trained."""
    if not options.trains_adapter:
        return config.num_parameters
    linears = linear_layers(config)
    sizes = [sum(linears[name]) for name in options.lora.target_modules]
    lengths = [linears[name][0] for name in options.lora.target_modules] if options.lora.use_dora else []
    return config.num_hidden_layers * (options.lora.rank * sum(sizes) + sum(lengths))


def optimizer_bytes(config: ModelConfig, options: TrainingOptions) -> int:
    trained = trained_parameters(config, options)
    match options.optimizer.name:
        case "adamw":
            return 2 * MASTER * trained
        case "adamw_8bit":
            return 2 * trained + 2 * MASTER * trained // 256  # a scale for each block of 256
        case "sgd":
            return MASTER * trained if options.optimizer.momentum > 0 else 0
        case "adafactor":
            return _factored_bytes(config, options)


def linear_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Output and input size of the linears of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


# ---- memory, part by part


def _rows(options: TrainingOptions) -> int:
    """Rows of one forward pass: a pair has two."""
    return options.batch_size * (2 if options.recipe == "dpo" else 1)


def _weight_bytes(config: ModelConfig, options: TrainingOptions, precision: Precision) -> int:
    if not options.trains_adapter:
        return MASTER * config.num_parameters
    return BYTES[precision] * config.num_parameters + MASTER * trained_parameters(config, options)


def _largest_parameter(config: ModelConfig, options: TrainingOptions) -> int:
    """A gradient lives from its computation to the step of its weight."""
    linears = linear_layers(config)
    if options.trains_adapter:
        return options.lora.rank * max(max(linears[name]) for name in options.lora.target_modules)
    embedding = config.vocab_size * config.hidden_size
    return max(embedding, *(rows * columns for rows, columns in linears.values()))


def _factored_bytes(config: ModelConfig, options: TrainingOptions) -> int:
    """Adafactor keeps a row and a column of each matrix."""
    linears, rank = linear_layers(config), options.lora.rank
    if options.trains_adapter:
        per_layer = sum(sum(linears[name]) + 2 * rank for name in options.lora.target_modules)
        return MASTER * config.num_hidden_layers * per_layer
    per_layer = sum(map(sum, linears.values())) + 2 * config.hidden_size
    outer = (1 if config.tie_word_embeddings else 2) * (config.vocab_size + config.hidden_size)
    return MASTER * (config.num_hidden_layers * per_layer + outer)


def _activation_bytes(
    config: ModelConfig, options: TrainingOptions, precision: Precision, *, tokens: int, length: int, device: str
) -> int:
    layer = tokens * _layer_bytes_per_token(config, options, precision) + _cast_bytes(config, options, precision)
    if device == "cpu" and precision == "bf16":
        scores = tokens * length * config.num_attention_heads
        layer += BYTES[precision] * scores if scores <= MAX_SCORES else 0
    layers = config.num_hidden_layers
    if options.enable_activation_checkpointing:
        recomputed = math.ceil(layers / options.activation_checkpointing_interval)
        kept = recomputed * tokens * config.hidden_size * BYTES[precision]
        return (layers - recomputed + 1) * layer + kept  # the layer that is being recomputed has them all
    return layers * layer


def _layer_bytes_per_token(config: ModelConfig, options: TrainingOptions, precision: Precision) -> int:
    """Both norms keep what they were given in fp32, and normed where their weight is trained; linears keep their input
    where a weight behind it is trained; attention keeps q, k, v and its result; the MLP gate, up, silu(gate)."""
    e, hidden, inner = BYTES[precision], config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    is_full = not options.trains_adapter
    targets = set(linear_layers(config)) if is_full else set(options.lora.target_modules)
    norms = 2 * MASTER * hidden * (2 if is_full else 1)
    groups = [[name for name in names if name in targets] for names in SHARED_INPUTS]
    casts = is_full and precision == "bf16"  # each linear casts the fp32 result of a norm for itself
    linears = sum(e * hidden * (len(group) if casts else 1) for group in groups if group)
    linears += e * inner if "down_proj" in targets else 0
    attention = e * (2 * query + 2 * key_value)
    return (
        norms + linears + attention + 3 * e * inner + (0 if is_full else _adapter_bytes_per_token(config, options, e))
    )


def _adapter_bytes_per_token(config: ModelConfig, options: TrainingOptions, e: int) -> int:
    linears, lora = linear_layers(config), options.lora
    kept = e * lora.rank * len(lora.target_modules)
    if lora.dropout > 0:
        kept += sum((e + 1) * linears[name][1] for name in lora.target_modules)  # the input that is left, and a mask
    if lora.use_dora:
        kept += sum(2 * e * linears[name][0] for name in lora.target_modules)  # before and after the length
    return kept


def _cast_bytes(config: ModelConfig, options: TrainingOptions, precision: Precision) -> int:
    """Copies of a layer's fp32 weights in the precision of the products."""
    if precision == "fp32":
        return 0
    if options.trains_adapter:
        return BYTES[precision] * trained_parameters(config, options) // config.num_hidden_layers
    return BYTES[precision] * sum(rows * columns for rows, columns in linear_layers(config).values())


def _loss_bytes(config: ModelConfig, options: TrainingOptions, precision: Precision, *, tokens: int) -> int:
    """The final norm, the trained rows and their gradients, a chunk of logits in three forms, and the output matrix's
    cast and gradient."""
    e, matrix = BYTES[precision], config.vocab_size * config.hidden_size
    rows = min(tokens, max(1, LOGITS_BYTES // (4 * config.vocab_size)))
    chunk = rows * config.vocab_size * (2 * MASTER + 2 * e)
    hidden = tokens * config.hidden_size * (2 * MASTER + 2 * e)
    if options.trains_adapter:
        return chunk + hidden
    return chunk + hidden + (BYTES[precision] * matrix if precision == "bf16" else 0) + MASTER * matrix
