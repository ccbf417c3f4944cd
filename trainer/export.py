"""`python -m trainer.export FOLDER OUT.gguf`: a checkpoint as a GGUF file; an adapter is merged into its base first.

A process of its own, since it computes for minutes and, for adapters, needs torch. Exit code 0: OUT.gguf is whole. 2: it
was not written, and stderr says why in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import get_args

from lm.config_fields import read_json_object
from lm.errors import UserError
from lm.gguf_export import GgufType, export_gguf

ADAPTER_CONFIG = "adapter_config.json"
USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description="Write a checkpoint as a GGUF file.")
    parser.add_argument("folder", type=Path, help="a model, or an adapter")
    parser.add_argument("target", type=Path, help="the file; it must not be there yet")
    parser.add_argument("--type", choices=get_args(GgufType), default="f16", help="of the matrices; default: f16")
    parser.add_argument("--base", type=Path, help="an adapter's base model; default: the one that it names")
    parser.add_argument("--name", help="what the file calls the model; default: the folder's name")
    options = parser.parse_args(arguments)
    try:
        export_checkpoint(options.folder, options.target, options.type, base=options.base, name=options.name)
    except (UserError, OSError) as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return USER_ERROR
    print(options.target)
    return 0


def export_checkpoint(
    folder: Path, target: Path, kind: GgufType, *, base: Path | None = None, name: str | None = None
) -> None:
    """Write `folder`, a model or an adapter on `base`, as the GGUF file `target`.

    Raises as `export_gguf` does, and UserError for an adapter whose base is not there.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    if not (folder / ADAPTER_CONFIG).is_file():
        export_gguf(folder, target, kind, name=name)
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        merged = Path(temporary) / "merged"
        _merge(base or _named_base(folder), folder, merged)
        export_gguf(merged, target, kind, name=name or folder.name)


def _named_base(adapter: Path) -> Path:
    said = read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = Path(str(said))
    if not base.is_dir():
        raise UserError(f"{adapter} is an adapter on {said!r:.200}, which is no folder here; give its folder as --base")
    return base


def _merge(base: Path, adapter: Path, folder: Path) -> None:
    """In fp32, so that the file is rounded once."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import torch

    from lm.checkpoint import save_model
    from trainer.model_setup import merged_model

    save_model(merged_model(base, adapter).state_dict(), base, folder, dtype=torch.float32)


if __name__ == "__main__":
    sys.exit(main())
