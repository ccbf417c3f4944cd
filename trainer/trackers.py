"""TensorBoard, Weights & Biases and MLflow, each behind the same four calls. Torch-free until one is opened.

Whoever calls these takes their exceptions for warnings: see trainer/tracking.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.option_groups import MlflowConfig, WandbConfig

MAX_MLFLOW_BATCH = 1000
"""Metrics of one request, by its API."""
MAX_MLFLOW_VALUE = 6000
FLUSH_SECONDS = 60
WANDB_SECONDS = 30
"""How long a run waits for the server of Weights & Biases at its start and at its end."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is told at one step, by names such as `train/loss`."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a tracker is told of the run as it opens."""

    name: str
    folder: Path
    options: Mapping[str, Any]
    known_id: str | None
    """What the tracker calls the run, where it knows it from before a resume."""
    last_step: int | None
    """Behind which the run is resumed."""


class Tracker(Protocol):
    name: str
    """As in `tracking` of a configuration."""

    def open(self, run: RunFacts) -> str | None:
        """Returns the id under which the run is to be opened once it is resumed, if it has one."""

    def log(self, points: Sequence[Figures]) -> None: ...

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        """Answers by their prompts."""

    def close(self, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED, which are MLflow's words."""


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    name = "tensorboard"

    def open(self, run: RunFacts) -> None:
        from tensorboardX import SummaryWriter  # imports torch, which a run that has come so far has anyway

        # What was told of later steps before a resume is hidden from there on
        purge = None if run.last_step is None else run.last_step + 1
        # The writer's own names differ by the second only, and it writes over what is there
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(
            str(run.folder / "tensorboard"), purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
        )

    def log(self, points: Sequence[Figures]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.time)
        self._writer.flush()

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        for number, (prompt, answer) in enumerate(texts.items()):
            self._writer.add_text(f"samples/{number}", f"**{prompt}**\n\n{answer}", step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. Nothing but the options and the figures goes there: no code, no git, no console."""

    name = "wandb"

    def __init__(self, config: WandbConfig) -> None:
        self.config = config

    def open(self, run: RunFacts) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            init_timeout=WANDB_SECONDS,
            finish_timeout=WANDB_SECONDS,
            login_timeout=1,
        )
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or run.name,
            tags=self.config.tags,
            config=dict(run.options),
            dir=str(run.folder),
            id=run.known_id,
            resume="allow" if run.known_id else None,
            settings=settings,
        )
        # A resumed run tells some steps again, which W&B's own count of steps would not take
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, points: Sequence[Figures]) -> None:
        for point in points:
            self._run.log({"step": point.step, **point.values})

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        table = self._wandb.Table(columns=["prompt", "answer"], data=[list(pair) for pair in texts.items()])
        self._run.log({"step": step, "samples": table})

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


class Mlflow:
    """A run in an experiment of the MLflow server that the environment names."""

    name = "mlflow"

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config

    def open(self, run: RunFacts) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient()
        if run.known_id is not None:
            self._client.update_run(run.known_id, status="RUNNING")
            self._id = run.known_id
            return self._id
        found = self._client.get_experiment_by_name(self.config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.config.experiment)
        self._id = str(self._client.create_run(experiment, run_name=self.config.name or run.name).info.run_id)
        params = [Param(name, str(value)[:MAX_MLFLOW_VALUE]) for name, value in _flat(run.options).items()]
        self._client.log_batch(self._id, params=params[:100])
        return self._id

    def log(self, points: Sequence[Figures]) -> None:
        metrics = [
            self._metric(name, value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), MAX_MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_MLFLOW_BATCH])

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        lines = [f"## {prompt}\n\n{answer}\n" for prompt, answer in texts.items()]
        self._client.log_text(self._id, "\n".join(lines), f"samples/step_{step}.md")

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status=status, end_time=int(time.time() * 1000))


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"rank": 8}} as {"lora.rank": 8}."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
