"""Training state: all that the rest of a run depends on, so that it can go on as if it had never stopped.

`state/step_N/` holds what is trained, the optimizer's tensors and torch's random numbers as safetensors, and the rest
in state.json. It is published whole, and the one before goes only then: whenever a run is killed, one of them is there.
What is not trained comes from the base again, the data from its files, and their order from the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm.device import restore_random_state
from lm.errors import UserError
from lm.folder import publish
from lm.weight_files import read_header
from trainer.config import RunConfig, TrainingOptions
from trainer.position import Position
from trainer.run_folder import RunFolder

FORMAT = 1
STATE_FILE = "state.json"
SHARD_BYTES = 2_000_000_000
FREE_OPTIONS = frozenset(
    {
        *("epochs", "max_steps", "save_every_n_steps", "keep_last_n_checkpoints", "validate_every_n_steps"),
        *("early_stopping_patience", "early_stopping_min_delta", "sample_prompts", "sample_max_tokens", "tracking"),
        *("enable_activation_checkpointing", "activation_checkpointing_interval", "device"),
    }
)
"""Options that a run may change before it goes on. Of the others its state would be wrong, or half of it."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A state on the disk."""

    folder: Path
    position: Position
    fingerprint: str
    """Of the data."""
    python_random: list[Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, one at a time."""
        for path in self._files():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it has no other way)
                    yield name, file.get_tensor(name)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for path in self._files():
            yield from ((name, entry.shape) for name, entry in read_header(path).items())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def options_of(config: RunConfig) -> dict[str, Any]:
    """What a state may only go on with as it is."""
    return config.model_dump(mode="json", include=set(TrainingOptions.model_fields) - FREE_OPTIONS)


def save_state(
    folder: RunFolder, position: Position, tensors: Mapping[str, Tensor], *, config: RunConfig, fingerprint: str
) -> None:
    """Publish a state, and remove the one before. One of this step that is there already stays as it is."""
    final = folder.state / f"step_{position.step}"
    if not final.exists():
        version, numbers, gauss = random.getstate()
        values = {
            "format": FORMAT,
            "position": position.as_dict(),
            "options": options_of(config),
            "fingerprint": fingerprint,
            "python_random": [version, list(numbers), gauss],
        }
        with publish(final) as temporary:
            for number, shard in enumerate(_shards(tensors)):
                save_file(shard, temporary / f"tensors-{number:05}.safetensors", metadata={"format": "pt"})
            text = json.dumps(values, ensure_ascii=False, allow_nan=False)
            (temporary / STATE_FILE).write_text(text, encoding="utf-8")
    folder.remove_states(but=position.step)


def read_state(folder: RunFolder, config: RunConfig) -> TrainingState | None:
    """The newest state of a run. Raises UserError where an option changed that it cannot go on with."""
    newest = folder.newest_state()
    if newest is None:
        return None
    values = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))
    if values["format"] != FORMAT:
        raise UserError(f"{newest} was written by another version; begin a new run")
    _check_options(values["options"], options_of(config))
    return TrainingState(
        folder=newest,
        position=Position.from_dict(values["position"]),
        fingerprint=values["fingerprint"],
        python_random=values["python_random"],
    )


def _check_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if name in old and old[name] != value:
            raise UserError(
                f"{name}: the run was begun with {old[name]!r} and cannot go on with {value!r}; set it back, or begin "
                "a new run",
                param=name,
            )


def check_goes_on(state: TrainingState, fingerprint: str, total_steps: int) -> None:
    """Raises UserError where the data is not what the run was begun with, or where nothing of the run is left to do."""
    step = state.position.step
    if state.fingerprint != fingerprint:
        raise UserError(
            f"the data is not what the run was begun with (fingerprint {fingerprint}, and "
            f"{state.fingerprint} at step {step}); put it back, or begin a new run"
        )
    if step + state.position.finished > total_steps:
        raise UserError(
            f"max_steps: the run is behind step {step}, and shall end with step {total_steps}; raise max_steps or epochs",
            param="max_steps",
        )


def collect_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, random_numbers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a state, by name, on the devices they are on."""
    tensors = {f"random.{name}": tensor for name, tensor in random_numbers.items()}
    for name, parameter in _trained(model).items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def restore(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put everything back where it was. Raises UserError, before anything has changed, for the state of another model."""
    parameters = _trained(model)
    _check_fits(state, parameters)
    counts_on_host = not optimizer.defaults.get("fused")
    random_numbers: dict[str, Tensor] = {}
    for full_name, tensor in state.tensors():
        kind, _, name = full_name.partition(".")
        if kind == "random":
            random_numbers[name] = tensor
        elif kind == "parameter":
            with torch.no_grad():
                parameters[name].copy_(tensor)
        else:
            key, _, name = name.partition(".")
            stays = key == "step" and counts_on_host
            optimizer.state[parameters[name]][key] = tensor if stays else tensor.to(parameters[name].device)
    version, numbers, gauss = state.python_random
    random.setstate((version, tuple(numbers), gauss))
    restore_random_state(random_numbers, device)


def _check_fits(state: TrainingState, parameters: Mapping[str, nn.Parameter]) -> None:
    there = {name.removeprefix("parameter."): shape for name, shape in state.shapes() if name.startswith("parameter.")}
    here = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{state.folder} does not fit the model: {name} is {there.get(name)} there and {here.get(name)} here; "
                "begin a new run"
            )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors on the host, in parts that are small beside the whole."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    yield shard
