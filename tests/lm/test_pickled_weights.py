"""Weights that torch.save wrote: every layout gives the model of the safetensors, and no pickle gives anything else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import zipfile
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.checkpoint import load_weights, validate_weights
from lm.config import load_config
from lm.errors import UserError
from lm.layout import has_weights, is_model_folder
from lm.ops import REFERENCE
from lm.pickled_weights import open_pickled
from tests.support.layouts import LAYOUTS, interleaved, write_layout
from tests.support.tiny import make_tiny_llama, make_tiny_model
from tests.support.weights import BIN, bin_folder, load, logits, refused

# ---- layouts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_exactly_the_logits_of_the_safetensors(tmp_path: Path, layout: str, tied: bool) -> None:
    base = make_tiny_llama(tmp_path / "base", tie_word_embeddings=tied, head_dim=24)
    folder = write_layout(base, tmp_path / "other", layout)
    assert has_weights(folder)
    validate_weights(folder, load_config(folder))
    assert torch.equal(logits(folder), logits(base))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", ["pytorch_model.bin.index.json", "hf_model.pt", "torchtune_model.pt"])
def test_so_does_every_family(tmp_path: Path, family: str, layout: str) -> None:
    base = make_tiny_model(tmp_path / "base", family)
    assert torch.equal(logits(write_layout(base, tmp_path / "other", layout)), logits(base))


def test_metas_rows_turned_as_meta_turns_them_give_the_scores_that_ours_give() -> None:
    """Meta multiplies pairs of neighbours, as complex numbers, by the angle of their position."""
    heads, size, width, length = 3, 8, 5, 6
    torch.manual_seed(0)
    query, key, x = (torch.randn(*shape).double() for shape in ((24, width), (24, width), (length, width)))
    angles = torch.arange(length)[:, None].double() * (1 / 100 ** (torch.arange(size // 2) / (size // 2))).double()

    def metas(weight: torch.Tensor) -> torch.Tensor:
        pairs = (x @ interleaved(weight, heads).T).view(length, heads, size // 2, 2)
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def ours(weight: torch.Tensor) -> torch.Tensor:
        values = (x @ weight.T).view(1, length, heads, size)
        cos, sin = (torch.cat((part, part), -1)[None, :, None] for part in (angles.cos(), angles.sin()))
        sin = torch.cat((-sin[..., : size // 2], sin[..., size // 2 :]), -1)
        return REFERENCE.apply_rope(values, values, cos, sin)[0][0]

    scores = [torch.einsum("thd,shd->hts", turn(query), turn(key)) for turn in (metas, ours)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)  # ours turns in fp32


def test_an_untied_model_of_meta_without_a_head_uses_its_embedding(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    folder = write_layout(base, tmp_path / "meta", "consolidated.00.pth")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    assert load(folder).lm_head is not None
    assert torch.equal(logits(folder), logits(base))


def test_a_folder_of_meta_alone_needs_no_config_json(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", tie_word_embeddings=False, rms_norm_eps=1e-5, intermediate_size=96)
    folder = write_layout(base, tmp_path / "meta", "original/consolidated.00.pth")
    (folder / "config.json").unlink()
    assert not is_model_folder(folder)
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 272, "multiple_of": 32}
    (folder / "original" / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5}), encoding="utf-8")
    assert is_model_folder(folder)
    assert torch.equal(logits(folder), logits(base))


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_hold_another_head(tmp_path: Path) -> None:
    embedding = load_file(make_tiny_llama(tmp_path / "base") / "model.safetensors")["model.embed_tokens.weight"]
    same = bin_folder(tmp_path / "same", {"lm_head.weight": embedding})
    assert torch.equal(logits(same), logits(tmp_path / "base"))
    other = bin_folder(tmp_path / "other", {"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"an lm_head\.weight unlike its embedding.* in its config\.json"):
        load(other)


def test_one_of_metas_names_among_others_turns_no_rows(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    folder = write_layout(base, tmp_path / "mixed", "pytorch_model.bin")
    tensors["output.weight"] = tensors.pop("lm_head.weight")
    torch.save(tensors, folder / BIN)
    assert torch.equal(logits(folder), logits(base))


def test_tables_of_frequencies_are_passed_over(tmp_path: Path) -> None:
    table = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    base = make_tiny_llama(tmp_path / "base")
    assert torch.equal(logits(bin_folder(tmp_path / "old", table)), logits(base))


def test_safetensors_come_first_and_the_log_names_what_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_tiny_llama(tmp_path / "base")
    expected = logits(base)
    torch.save({"model.norm.weight": torch.ones(32)}, base / "hf_model_0001_0.pt")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(base), expected)
    assert "hf_model_0001_0.pt" in caplog.text


def test_of_several_epochs_the_newest_is_read_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_layout(make_tiny_llama(tmp_path / "base"), tmp_path / "other", "hf_model.pt")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "[8, 9, 10]: the newest, 10, is read" in caplog.text


def test_weights_in_bf16_are_cast_and_the_files_are_left_as_they_are(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    halved = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    folder = bin_folder(tmp_path / "half", halved)
    before = (folder / BIN).read_bytes()
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, halved[name].float()) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    assert (folder / BIN).read_bytes() == before


# ---- what is refused


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["tensor", "whole file", "whole pickle"])
@pytest.mark.parametrize("function", ["system", "exec", "open"])
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, function: str, place: str) -> None:
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()"
    attack = {
        "system": Malicious(os.system, f"touch {trace}"),
        "exec": Malicious(exec, code),
        "open": Malicious(open, str(trace), "w"),
    }[function]
    folder = bin_folder(tmp_path / "model", {"model.norm.weight": attack} if place == "tensor" else attack)
    if place == "whole pickle":
        (folder / BIN).write_bytes(pickle.dumps({"model.norm.weight": attack}))
    text = refused(folder, "not a whole file of torch.save" if place == "whole pickle" else "refused: it asks for")
    assert not trace.exists()
    assert "weights_only" not in text
    assert "add_safe_globals" not in text


@pytest.mark.parametrize("value", [deque(), partial(print), Path("x")])
def test_what_a_pickle_asks_for_is_named(tmp_path: Path, value: object) -> None:
    folder = bin_folder(tmp_path, {"model.norm.weight": value})
    refused(folder, rf"asks for \w+.*{type(value).__name__}.*nothing but tensors")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3}, r"plain tensors, unlike epoch \(int\)"),
        ({"model": {"model.norm.weight": torch.ones(32)}}, r"plain tensors, unlike model \(dict\)"),
        ({"model.norm.weight": torch.ones(32, device="meta")}, r"unlike model\.norm\.weight"),
        ({"model.norm.weight": torch.ones(32).to_sparse()}, r"unlike model\.norm\.weight"),
        ({3: torch.ones(1)}, "table of names"),
        ([torch.ones(1)], r"table of names and tensors \(got list\)"),
        ({"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight is 31 and should be 32"),
        ({"model.norm.weight": torch.tensor(1.0)}, r"model\.norm\.weight is a scalar and should be 32"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, r"model\.norm\.weight has dtype torch\.int64"),
        ({"model.norm.bias": torch.ones(32)}, r"leaves no place for: model\.norm\.bias"),
        ({"norm.weight": torch.ones(32)}, r"another name for model\.norm\.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_table_of_the_models_tensors_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    refused(bin_folder(tmp_path, content), reason)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    tensors = torch.load(folder / BIN, weights_only=True)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    torch.save(tensors, folder / BIN)
    refused(folder, r"lacks the tensors model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight")


def test_an_untied_model_of_hugging_face_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    refused(folder, r"lacks the tensors lm_head\.weight")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    folder = bin_folder(tmp_path)
    data = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(data[: int(len(data) * share)])
    refused(folder, r"pytorch_model\.bin is not a whole file of torch\.save .*Copy it again")


def test_a_pointer_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    (folder / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", encoding="utf-8")
    refused(folder, "a pointer of Git LFS")
    torch.save({"a": torch.ones(2)}, folder / BIN, _use_new_zipfile_serialization=False)
    refused(folder, r"older than PyTorch 1\.6")
    with zipfile.ZipFile(folder / BIN, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    refused(folder, "is damaged")


def rezip(path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive anew, with other contents of its parts (by their last names); None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            changed = changes.get(name.partition("/")[2], data)
            if changed is not None:
                archive.writestr(name, changed)


def test_an_archive_with_compressed_short_or_missing_tensors_is_refused(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path / "base")
    cases: list[tuple[dict[str, bytes | None], int, str]] = [
        ({}, zipfile.ZIP_DEFLATED, "compressed parts"),
        ({"data/0": None}, zipfile.ZIP_STORED, "damaged"),
        ({"data.pkl": b""}, zipfile.ZIP_STORED, "damaged"),
        ({"data.pkl": b"junk"}, zipfile.ZIP_STORED, "damaged"),
    ]
    for number, (changes, compression, reason) in enumerate(cases):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        rezip(copy / BIN, changes, compression)
        refused(copy, reason)


def test_a_damaged_pickle_raises_nothing_but_user_errors(tmp_path: Path) -> None:
    folder = bin_folder(tmp_path)
    whole = (folder / BIN).read_bytes()
    with zipfile.ZipFile(folder / BIN) as archive:
        program = archive.read(f"{Path(BIN).stem}/data.pkl")
    config = load_config(folder)
    chance, num_refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(program)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (folder / BIN).write_bytes(whole)
        rezip(folder / BIN, {"data.pkl": bytes(damaged)})
        try:
            open_pickled(folder, config)
        except UserError:
            num_refused += 1
    assert num_refused > 150


def test_a_model_of_another_shape_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = load(make_tiny_llama(tmp_path / "small"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"gate_proj\.weight is 72x32 and should be 64x32"):
        load_weights(model, bin_folder(tmp_path / "large", intermediate_size=72))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
