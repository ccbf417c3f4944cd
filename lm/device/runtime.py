"""Random numbers, their state, and waiting, on any device."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed Python's and torch's random numbers, those of `device` included."""
    random.seed(seed)
    torch.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's random numbers are, those of `device` included: uint8 on the host, by `host` and `device`."""
    state = {"host": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Let torch's random numbers go on from `state`. That of another kind of device is left out."""
    torch.set_rng_state(state["host"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def synchronize(device: torch.device) -> None:
    """Return when the device has done all it was asked to."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
