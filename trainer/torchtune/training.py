"""Optimizer, schedule, loss and logger of a configuration, into our own terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.errors import UserError
from trainer.torchtune.fields import Collected, component_of
from trainer.torchtune.overrides import COMPONENT
from trainer.torchtune.training_components import ADAFACTOR, DPO_LOSS, EIGHT_BITS, MLFLOW, SGD, TENSORBOARD, WANDB

ADAMW_RATE, ADAMW_DECAY = 1e-3, 0.01
"""torch.optim.AdamW's own defaults, and those of its relatives."""
DEFAULTS = {SGD: (1e-3, 0.0), ADAFACTOR: (1e-2, 0.0)}
"""Rate and decay of the others."""
LINEAR = "get_linear_schedule_with_warmup"


def read_optimizer(group: object, scheduler: object, collected: Collected) -> None:
    """Without both, our own defaults; with the optimizer alone, its rate is constant, as in torchtune."""
    if group is None and scheduler is None:
        collected.note("optimizer", "missing: AdamW with this service's rate, warm-up and cosine")
        return
    _read_scheduler(scheduler, collected)
    if group is None:
        return
    name, component, keys = component_of("optimizer", group)
    rate, decay = DEFAULTS.get(name, (ADAMW_RATE, ADAMW_DECAY))
    collected.set("learning_rate", rate, "optimizer.lr")
    collected.set("weight_decay", decay, "optimizer.weight_decay")
    taken = {key: value for key, value in keys.items() if value is not None or key not in component.keys}
    collected.read(taken, component.keys, "optimizer")
    ours: dict[str, Any] = {"name": {SGD: "sgd", ADAFACTOR: "adafactor"}.get(name, "adamw")}
    ours["name"] = "adamw_8bit" if name in EIGHT_BITS else ours["name"]
    for key in ("betas", "eps") if ours["name"].startswith("adamw") else ("momentum",):
        if keys.get(key) is not None:
            ours[key] = keys[key]
    collected.set("optimizer", ours, "optimizer")
    collected.origins |= {f"optimizer.{key}": f"optimizer.{key}" for key in ours} | {
        "optimizer.name": f"optimizer.{COMPONENT}"
    }
    if "Paged" in name:
        collected.note("optimizer", f"{name} is {ours['name']} here, whose moments stay on the device")


def _read_scheduler(scheduler: object, collected: Collected) -> None:
    if scheduler is None:
        collected.set("lr_schedule", "constant", "lr_scheduler")
        collected.set("warmup_steps", 0, "lr_scheduler")
        return
    name, component, keys = component_of("lr_scheduler", scheduler)
    collected.read(keys, component.keys, "lr_scheduler")
    if keys.get("num_warmup_steps") is None:
        where = "lr_scheduler.num_warmup_steps"
        raise UserError(f"{where}: this field is required", param=where)
    if name.endswith(LINEAR):
        collected.set("lr_schedule", "linear", f"lr_scheduler.{COMPONENT}")


def read_loss(group: object, recipe: str, update: str, collected: Collected) -> None:
    """Raises UserError for the loss of another recipe."""
    keys: Mapping[str, Any] = {}
    if group is not None:
        name, component, keys = component_of("loss", group)
        collected.read(keys, component.keys, "loss")
        if (name == DPO_LOSS) != (recipe == "dpo"):
            fits = f"take {DPO_LOSS}" if recipe == "dpo" else "it is for the dpo recipe"
            param = f"loss.{COMPONENT}"
            raise UserError(f"{param}: {name} is no loss of the recipe {recipe}: {fits}", param=param)
    if recipe == "dpo":
        options = {key: keys[key] for key in ("beta", "label_smoothing") if keys.get(key) is not None}
        collected.set("dpo", {"update": update, **options}, "loss")
        collected.origins |= {f"dpo.{key}": f"loss.{key}" for key in options}


def read_logger(group: object, collected: Collected) -> None:
    if group is None:
        return
    name, component, keys = component_of("metric_logger", group)
    collected.read(keys, component.keys, "metric_logger")
    said = {key: value for key, value in keys.items() if value is not None}
    if name == WANDB:
        wandb: dict[str, Any] = {key: said[key] for key in ("entity", "name", "tags") if key in said}
        _set_tracking("wandb", {"project": said.get("project", "torchtune"), **wandb}, collected)
    elif name == MLFLOW:
        mlflow = {"experiment": said.get("experiment_name", "default_experiment")}
        mlflow |= {"name": said["run_name"]} if "run_name" in said else {}
        _set_tracking("mlflow", mlflow, collected)
        collected.origins |= {
            "tracking.mlflow.experiment": "metric_logger.experiment_name",
            "tracking.mlflow.name": "metric_logger.run_name",
        }
    elif name == TENSORBOARD:
        collected.set("tracking", {"tensorboard": True}, "metric_logger")


def _set_tracking(tracker: str, options: dict[str, Any], collected: Collected) -> None:
    collected.set("tracking", {tracker: options}, "metric_logger")
    collected.origins[f"tracking.{tracker}"] = "metric_logger"
