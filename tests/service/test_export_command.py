"""`tuneserve export` as a person runs it: the child process that does it is a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.adapter import save_adapter
from lm.lora import LoraSpec, add_lora
from service.cli import main
from tests.support.tiny import load_tiny_model, make_tiny_llama


def test_an_adapter_is_merged_into_the_base_of_the_home_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_llama(tmp_path / "home" / "models" / "tiny")
    model = load_tiny_model(base)
    add_lora(model, LoraSpec(rank=2, alpha=4.0, dropout=0.0, target_modules=("q_proj",)))
    save_adapter(model, tmp_path / "step_3", base_model="tiny")
    monkeypatch.setenv("TUNESERVE_HOME", str(tmp_path / "home"))
    capfd.readouterr()
    out = tmp_path / "out.gguf"
    assert main(["export", str(tmp_path / "step_3"), str(out), "--type", "q8_0"]) == 0
    assert capfd.readouterr() == (f"{out}\n", "")
    assert out.read_bytes()[:4] == b"GGUF"
    monkeypatch.setenv("TUNESERVE_HOME", str(tmp_path / "nowhere"))
    assert main(["export", str(tmp_path / "step_3"), str(tmp_path / "again.gguf")]) == 2
    assert "is an adapter on 'tiny', which is no folder here; give its folder as --base" in capfd.readouterr().err
