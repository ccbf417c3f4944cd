"""Configs and data sets that travel with the package: `configs/` and `examples/`, beside our packages in any install."""

from __future__ import annotations

import difflib
from pathlib import Path

import service
from lm.errors import UserError
from lm.folder import user_path

ROOT = Path(service.__file__).resolve().parents[1]


def stock_configs() -> dict[str, Path]:
    """By name: `serve`, `llama3_2/1B_lora_cpu`; those outside of a family's folder first."""
    folder = ROOT / "configs"
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_config(name: str) -> Path:
    """The YAML file at the path `name`, or the stock config of that name, with or without `.yaml`.

    Raises UserError with stock names.
    """
    path = user_path(name)
    stock = stock_configs()
    key = name.removeprefix("configs/").removesuffix(".yaml")
    if path.is_file():
        return path
    if key in stock:
        return stock[key]
    near = difflib.get_close_matches(key, stock, n=3, cutoff=0.5)
    shown = list(dict.fromkeys([*near, *(known for known in stock if "/" not in known)]))
    raise UserError(
        f"config: there is no file {name}, and no stock config of that name: {', '.join(shown)} ... "
        f"`tuneserve ls` lists all {len(stock)}",
        param="config",
    )


def find_data(name: str) -> Path:
    """The file at the path `name`, or the shipped one, such as `examples/identity.json`. Raises UserError."""
    path = user_path(name)
    shipped = ROOT / "examples" / path.name
    if path.is_file():
        return path.resolve()
    if path.parent == Path("examples") and shipped.is_file():
        return shipped
    raise UserError(f"data_files: there is no file {name}", param="data_files")
