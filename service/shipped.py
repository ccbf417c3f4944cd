"""Configs and data sets that travel with the package: `configs/` and `examples/`, beside our packages in any install."""

from __future__ import annotations

from pathlib import Path

import service
from lm.errors import UserError

ROOT = Path(service.__file__).resolve().parents[1]


def find_config(name: str) -> Path:
    """The YAML file at the path `name`, or the stock config of that name, with or without `.yaml`.

    Raises UserError with the stock names.
    """
    path = Path(name).expanduser()
    stock = {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml"))}
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")) and path.name.removesuffix(".yaml") in stock:
        return stock[path.name.removesuffix(".yaml")]
    raise UserError(f"config: there is no file {name}, and no stock config of that name: {', '.join(stock)}")


def find_data(name: str) -> Path:
    """The file at the path `name`, or the shipped one, such as `examples/identity.json`. Raises UserError."""
    path = Path(name).expanduser()
    shipped = ROOT / "examples" / path.name
    if path.is_file():
        return path.resolve()
    if path.parent == Path("examples") and shipped.is_file():
        return shipped
    raise UserError(f"data_files: there is no file {name}", param="data_files")
