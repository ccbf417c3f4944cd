from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from service.cli import main, parse_overrides
from service.settings import Settings, load_settings

SECRET = "sk-very.secret~1"


def keys_of(settings: Settings) -> list[str]:
    return [key.get_secret_value() for key in settings.api_keys]


@pytest.mark.parametrize("value", [[SECRET, "b"], f"{SECRET}, b", f"[{SECRET}, 'b']"])
def test_keys_are_a_list_or_a_text_with_commas(value: Any) -> None:
    assert keys_of(load_settings(overrides={"api_keys": value})) == [SECRET, "b"]
    if isinstance(value, str):
        assert keys_of(load_settings(environ={"TUNESERVE_API_KEYS": value})) == [SECRET, "b"]
        assert keys_of(load_settings(overrides=parse_overrides([f"api_keys={value}"]))) == [SECRET, "b"]


def test_a_key_of_digits_stays_a_text_outside_of_yaml_files() -> None:
    assert keys_of(load_settings(overrides=parse_overrides(["api_keys=0123"]))) == ["0123"]
    assert keys_of(load_settings(environ={"TUNESERVE_API_KEYS": "0123"})) == ["0123"]


def test_a_file_of_keys_adds_to_the_others(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\n  {SECRET}  \nb\n")
    assert keys_of(load_settings(overrides={"api_keys": "a", "api_key_file": str(file)})) == ["a", SECRET, "b"]
    assert keys_of(load_settings(environ={"TUNESERVE_API_KEY_FILE": str(file)})) == [SECRET, "b"]


@pytest.mark.parametrize(
    "value",
    ["", "  ", f"{SECRET},", f"{SECRET} b", [f"{SECRET}\n"], [SECRET, ""], [SECRET + "ä"], [SECRET, 5], 5, {SECRET: 1},
     [SECRET] * 1001, SECRET * 100],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_being_shown(value: Any) -> None:
    with pytest.raises(UserError, match=r"^api_keys: ") as caught:
        load_settings(overrides={"api_keys": value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "holds no key"), (b"# nothing\n", "holds no key"), (b"a\nsk-very secret\n", "line 2"),
     (b"\xff\xfe", "no text in UTF-8"), (b"sk-very.secret\n" * 100_000, "larger than"), (None, "cannot read")],
)  # fmt: skip
def test_a_file_that_holds_none_is_refused_without_being_shown(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    file = tmp_path / "keys"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_settings(overrides={"api_key_file": str(file)})
    assert caught.value.param == "api_key_file"
    assert "secret" not in str(caught.value)


def test_no_form_of_the_settings_shows_a_key() -> None:
    settings = load_settings(overrides={"api_keys": [SECRET]})
    for shown in (repr(settings), str(settings), str(settings.model_dump())):
        assert SECRET not in shown


@pytest.mark.parametrize("word", [f"api_keys=[{SECRET}", f"api_keys={{{SECRET}: [", f"api_keys=&{SECRET} *{SECRET} b"])
def test_the_command_line_tells_a_mistake_without_the_key(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["serve", word, "model=none"])
    shown = capsys.readouterr()
    assert code == 2
    assert "secret" not in shown.err + shown.out


def test_a_config_with_wrong_keys_is_told_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"api_keys: ['{SECRET} x']\n")
    assert main(["validate", str(config)]) == 2
    assert "secret" not in capsys.readouterr().err
