"""A pull of what is on this machine already: GGUF files and model folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lm.errors import NotFoundError, UserError
from service.pull import pull_any
from tests.support.gguf_file import make_tiny_gguf
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.tiny import load_tiny_model, make_tiny_llama

CODE = "import sys; from service.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(home: Path) -> list[str]:
    models = home / "models"
    return [path.name for path in models.iterdir() if not path.name.endswith(".lock")] if models.exists() else []


def test_a_gguf_file_becomes_a_model_under_the_files_name(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "Tiny-1B.Q4_1.gguf")
    folder = pull_any(str(tmp_path / "Tiny-1B.Q4_1.gguf"), tmp_path)
    assert folder == tmp_path / "models" / "Tiny-1B.Q4_1"
    AutoModelForCausalLM.from_pretrained(folder)
    assert published(tmp_path) == ["Tiny-1B.Q4_1"]


def test_the_command_takes_a_gguf_file_and_a_name_and_prints_the_folder(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    source = [str(tmp_path / "tiny.gguf"), "--name", "mine", "--home", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", CODE, "pull", *source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'models' / 'mine'}\n"), done.stderr


def test_a_file_name_that_is_no_model_id_is_cleaned(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "my tiny (1).gguf")
    assert pull_any(str(tmp_path / "my tiny (1).gguf"), tmp_path).name == "my-tiny-1"


def test_a_name_that_is_no_model_id_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name: '\.\./x' cannot stand in a model id"):
        pull_any(str(base), tmp_path, "../x")


def test_a_damaged_gguf_file_leaves_nothing(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    os.truncate(tmp_path / "tiny.gguf", (tmp_path / "tiny.gguf").stat().st_size // 2)
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        pull_any(str(tmp_path / "tiny.gguf"), tmp_path)
    assert published(tmp_path) == []


def test_a_folder_is_copied_without_code_and_without_what_is_not_read(base: Path, tmp_path: Path) -> None:
    before = tree(base)
    for name in ("modeling.py", "pytorch_model.bin", ".secret.json", "tiny.gguf"):
        (base / name).write_text("not needed")
    folder = pull_any(str(base), tmp_path, "copy")
    assert tree(folder) == before
    load_tiny_model(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_any_layout_is_copied(layout: str, base: Path, tmp_path: Path) -> None:
    source = write_layout(base, tmp_path / "other", layout)
    assert tree(pull_any(str(source), tmp_path)) == tree(source)


def test_a_model_that_is_there_stays_as_it_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pull_any(str(base), tmp_path)
    before = tree(folder)
    assert pull_any(str(make_tiny_llama(tmp_path / "new", seed=1)), tmp_path, "base") == folder
    assert "base is there already" in capsys.readouterr().err
    assert tree(folder) == before


def test_a_snapshot_in_the_hubs_cache_becomes_files(base: Path, tmp_path: Path) -> None:
    (blobs := tmp_path / "models--org--tiny" / "blobs").mkdir(parents=True)
    (snapshot := blobs.parent / "snapshots" / "abc").mkdir(parents=True)
    for path in base.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    folder = pull_any(str(snapshot), tmp_path, "tiny")
    assert tree(folder) == tree(base)
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_link_that_leaves_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"base/LICENSE is a link to .*/secret, outside the folder"):
        pull_any(str(base), tmp_path)
    assert published(tmp_path) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_is_no_whole_model_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    (base / name).unlink()
    with pytest.raises(UserError):
        pull_any(str(base), tmp_path)
    assert published(tmp_path) == []


def test_what_is_nothing_of_all_that_is_refused_with_what_can_be_pulled(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'nothing' is neither a known name .* nor an id of the Hugging Face hub"):
        pull_any("nothing", tmp_path)
    with pytest.raises(NotFoundError, match=r"there is no file .*none\.gguf"):
        pull_any(str(tmp_path / "none.gguf"), tmp_path)
