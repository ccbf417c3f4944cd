"""Optimizers, schedules, losses and loggers by the names that a configuration has for them, each with its keys."""

from __future__ import annotations

from trainer.torchtune.component import Component
from trainer.torchtune.keys import Key, by_name, honoured, mapped, refused

_RATE = honoured("lr", "the peak; default of the component", option="learning_rate")
_DECAY = honoured("weight_decay", "on matrices only; default of the component", option="weight_decay")
_ADAMW = (
    _RATE,
    _DECAY,
    honoured("betas", "optimizer.betas; default 0.9 and 0.999"),
    honoured("eps", "optimizer.eps; default 1e-8"),
    refused("amsgrad", "plain AdamW is used"),
)
_FUSED = (
    mapped("fused", "the device decides; the numbers are the same", silent=(None, True, False)),
    mapped("foreach", "the device decides; the numbers are the same", silent=(None, True, False)),
)
_TORCH = (
    *_FUSED,
    refused("maximize", "the loss is minimized"),
    refused("capturable", "no step is captured in a graph"),
    refused("differentiable", "no gradient goes through the optimizer"),
)
_BITSANDBYTES = (
    *_ADAMW,
    mapped("optim_bits", "the component's name says how many", silent=(None, 8, 32)),
    mapped("percentile_clipping", "gradients are clipped by clip_grad_norm", silent=(None, 100)),
    mapped("block_wise", "8 bits are always block-wise", silent=(None, True)),
    mapped("min_8bit_size", "small tensors keep 32 bits by the optimizer's own rule", silent=(None, 4096)),
    mapped("fused", "the device decides; the numbers are the same", silent=(None, True, False)),
)
_TORCHAO = (*_ADAMW, mapped("block_size", "blocks have 256 numbers", silent=(None, 256)))


def _adamw(keys: tuple[Key, ...], text: str) -> Component:
    return Component(keys=by_name(keys), text=text)


EIGHT_BITS = (
    "bitsandbytes.optim.PagedAdamW8bit",
    "bitsandbytes.optim.AdamW8bit",
    "torchao.optim.AdamW8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit",
)
SGD, ADAFACTOR = "torch.optim.SGD", "torch.optim.Adafactor"

OPTIMIZERS = {
    "torch.optim.AdamW": _adamw((*_ADAMW, *_TORCH), "adamw: moments in fp32"),
    SGD: Component(
        keys=by_name(
            (
                _RATE,
                _DECAY,
                honoured("momentum", "optimizer.momentum; default 0"),
                refused("dampening", "the whole gradient goes into the momentum", only=(None, 0, 0.0)),
                refused("nesterov", "plain momentum is used"),
                *_TORCH,
            )
        ),
        text="sgd",
    ),
    ADAFACTOR: Component(
        keys=by_name(
            (
                _RATE,
                _DECAY,
                refused("beta2_decay", "Adafactor's is -0.8", only=(None, -0.8)),
                refused("eps", "Adafactor's are its own", only=(None, [None, 1e-3])),
                refused("d", "Adafactor's clipping threshold is 1", only=(None, 1, 1.0)),
                *_TORCH,
            )
        ),
        text="adafactor",
    ),
    **{
        name: _adamw(
            _BITSANDBYTES if name.startswith("bits") else _TORCHAO, "adamw_8bit: moments in 8 bits, in plain torch"
        )
        for name in EIGHT_BITS
    },
    **{
        f"bitsandbytes.optim.{name}": _adamw(_BITSANDBYTES, "adamw: moments in fp32, which are not paged")
        for name in ("PagedAdamW", "AdamW")
    },
}

_LOSS = (
    mapped("num_output_chunks", "logits are always made in chunks", silent=(None, 8)),
    refused("ignore_index", "tokens that are not trained are left out whole", only=(None, -100)),
)
DPO_LOSS = "torchtune.rlhf.loss.DPOLoss"
LOSSES = {
    "torchtune.modules.loss.LinearCrossEntropyLoss": Component(
        keys=by_name(
            (
                *_LOSS,
                refused("tp_enabled", "training goes over one device"),
                mapped("mask_ignored_tokens", "their logits are never made", silent=(None, True, False)),
            )
        ),
        text="cross entropy",
    ),
    "torchtune.modules.loss.CEWithChunkedOutputLoss": Component(keys=by_name(_LOSS), text="cross entropy"),
    "torch.nn.CrossEntropyLoss": Component(
        keys=by_name((_LOSS[1], refused("reduction", "the mean over trained tokens", only=(None, "mean")))),
        text="cross entropy",
    ),
    DPO_LOSS: Component(
        keys=by_name(
            (
                honoured("beta", "dpo.beta; default 0.1"),
                honoured("label_smoothing", "dpo.label_smoothing; default 0"),
            )
        ),
        text="of the dpo recipe only",
    ),
}

_WARMUP = honoured("num_warmup_steps", "becomes warmup_steps", option="warmup_steps")
_LAST_EPOCH = refused("last_epoch", "a resumed run finds its own place", only=(None, -1))
_COSINE = by_name((_WARMUP, refused("num_cycles", "half a cosine, from the peak to 0", only=(None, 0.5)), _LAST_EPOCH))
SCHEDULERS = {
    "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": Component(
        keys=_COSINE, text="lr_schedule cosine"
    ),
    "torchtune.modules.get_cosine_schedule_with_warmup": Component(keys=_COSINE, text="lr_schedule cosine"),
    "transformers.get_cosine_schedule_with_warmup": Component(keys=_COSINE, text="lr_schedule cosine"),
    "transformers.get_linear_schedule_with_warmup": Component(
        keys=by_name((_WARMUP, _LAST_EPOCH)), text="lr_schedule linear"
    ),
}

_LOGGERS = "torchtune.training.metric_logging."
WANDB, TENSORBOARD, MLFLOW = (f"{_LOGGERS}{name}" for name in ("WandBLogger", "TensorBoardLogger", "MLFlowLogger"))
_LOGS = mapped("log_dir", "figures stand in metrics.csv and events.jsonl of the run folder", silent=(None,))
METRIC_LOGGERS = {
    f"{_LOGGERS}DiskLogger": Component(
        keys=by_name(
            (
                _LOGS,
                mapped("output_fmt", "metrics.csv and events.jsonl", silent=(None, "txt", "jsonl")),
                mapped("filename", "metrics.csv and events.jsonl", silent=(None,)),
            )
        ),
        text="metrics.csv and events.jsonl of the run",
    ),
    f"{_LOGGERS}StdoutLogger": Component(text="the progress bar; metrics.csv has the rest"),
    TENSORBOARD: Component(
        keys=by_name(
            (
                mapped("log_dir", "event files are in tensorboard/ of the run folder", silent=(None,)),
                mapped("organize_logs", "each run has a folder of its own", silent=(None, True)),
            )
        ),
        text="tracking.tensorboard, which is on anyway",
    ),
    WANDB: Component(
        keys=by_name(
            (
                honoured("project", "tracking.wandb.project; default `torchtune`"),
                honoured("entity", "tracking.wandb.entity"),
                honoured("name", "tracking.wandb.name; default: the run folder's"),
                honoured("tags", "tracking.wandb.tags"),
                mapped("group", "runs are not grouped", silent=(None,)),
                mapped("log_dir", "its files are in the run folder", silent=(None,)),
            )
        ),
        text="tracking.wandb; the key is read from WANDB_API_KEY",
    ),
    MLFLOW: Component(
        keys=by_name(
            (
                honoured("experiment_name", "tracking.mlflow.experiment; default `default_experiment`"),
                honoured("run_name", "tracking.mlflow.name; default: the run folder's"),
                refused("tracking_uri", "the server is MLFLOW_TRACKING_URI's, of the environment", only=(None,)),
                refused("run_id", "a run gets an id of its own, and keeps it when it is resumed", only=(None,)),
            )
        ),
        text="tracking.mlflow",
    ),
}
