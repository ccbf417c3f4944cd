from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from service.database import Database
from service.settings import Settings, load_settings, parse_size


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    config = write(tmp_path, "port: 1\nmax_num_seqs: 1\ndevice: npu:1\n")
    environ = {"TUNESERVE_PORT": "2", "TUNESERVE_MAX_NUM_SEQS": "2"}
    settings = load_settings(config, {"port": 3}, environ)
    assert (settings.port, settings.max_num_seqs, settings.device) == (3, 2, "npu:1")


def test_the_environment_is_read_as_yaml_and_text_stays_text(tmp_path: Path) -> None:
    environ = {
        "TUNESERVE_HOME": str(tmp_path), "TUNESERVE_MODEL": "1e3", "TUNESERVE_SERVED_MODEL_ALIASES": "[a, b]",
        "TUNESERVE_KV_CACHE_MEMORY": "2GiB", "TUNESERVE_MAX_MODEL_LEN": "null", "TUNESERVE_SERVICE_HOST": "10.0.0.1",
    }  # fmt: skip
    settings = load_settings(environ=environ)
    assert (settings.home, settings.model, settings.served_model_aliases) == (tmp_path, "1e3", ("a", "b"))
    assert (settings.kv_cache_memory, settings.max_model_len) == (2 << 30, None)


def test_an_empty_config_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "")).port == Settings().port


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512MiB", 512 << 20), ("2 GB", 2 * 10**9), ("1.5k", 1500), ("10", 10), ("7B", 7), (12, 12), (None, None)],
)
def test_sizes_have_units(size: object, expected: object) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    ("overrides", "field"),
    [({"port": 70000}, "port"), ({"port": "8000"}, "port"), ({"device": "gpu"}, "device"), ({"prot": 1}, "prot"),
     ({"kv_cache_memory": "2 cats"}, "kv_cache_memory"), ({"kv_cache_memory": 0}, "kv_cache_memory"),
     ({"max_num_seqs": 0}, "max_num_seqs"), ({"drain_seconds": float("inf")}, "drain_seconds")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"^{field}: ") as caught:
        load_settings(overrides=overrides)
    assert caught.value.param == field


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    with pytest.raises(UserError, match="TUNESERVE_PORT"):
        load_settings(environ={"TUNESERVE_PORT": "[1"})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"serve\.yaml"):
        load_settings(write(tmp_path, text))


def test_a_model_is_a_name_in_home_or_a_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "models" / "mine", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert Settings(home=tmp_path, model="mine").model_dir == tmp_path / "models" / "mine"
    assert Settings(home=tmp_path, model=str(tmp_path / "elsewhere")).model_name == "elsewhere"


def test_a_registered_model_is_called_by_its_registered_name_while_it_is_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "models" / "org" / "nested", tmp_path / "models" / "mine"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    settings = Settings(home=tmp_path, model="mine")
    assert settings.model_dir == tmp_path / "models" / "mine"
    with closing(Database(settings.database)) as database:
        database.insert("entries", id="mine", base="mine", kind="base", folder="models/org/nested", created_at=1.0)
        assert (settings.model_dir, settings.model_name) == (tmp_path / "models" / "org" / "nested", "mine")
    assert settings.model_dir == tmp_path / "models" / "org" / "nested"
    (tmp_path / "models" / "org" / "nested" / "config.json").unlink()
    assert settings.model_dir == tmp_path / "models" / "mine"
    settings.database.write_bytes(b"no database")
    assert settings.model_name == "mine"


@pytest.mark.parametrize("name", ["params.json", "original/params.json"])
def test_a_model_of_meta_is_found_by_its_params_json(tmp_path: Path, name: str) -> None:
    path = tmp_path / "models" / "mine" / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert Settings(home=tmp_path, model="mine").model_name == "mine"
    with pytest.raises(UserError, match="holds mine"):
        _ = Settings(home=tmp_path, model="yours").model_dir


def test_a_linked_model_is_called_by_the_name_of_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "c4f3b2"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(snapshot)
    assert Settings(home=tmp_path, model="mine").model_name == "mine"
    monkeypatch.chdir(snapshot)
    assert Settings(home=tmp_path, model=".").model_dir == snapshot


def test_a_missing_model_says_what_there_is_and_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").touch()
    with pytest.raises(UserError, match=r"no model 'yours'.*holds mine.*tuneserve pull yours"):
        _ = Settings(home=tmp_path, model="yours").model_dir
