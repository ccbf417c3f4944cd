"""Random numbers and waiting, on any device."""

from __future__ import annotations

import random

import torch


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed Python's and torch's random numbers, those of `device` included."""
    random.seed(seed)
    torch.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)


def synchronize(device: torch.device) -> None:
    """Return when the device has done all it was asked to."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
