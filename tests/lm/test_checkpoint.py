"""Weights in and out: what we write loads everywhere, what we load is what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.checkpoint import load_weights, save_model, weights_hash
from lm.config import load_config
from lm.errors import UserError
from lm.model import CausalLM, build_model
from lm.ops import REFERENCE
from lm.template import load_template
from lm.tokenizer import load_tokenizer
from tests.support.layouts import write_layout
from tests.support.tiny import make_tiny_llama
from tests.support.tiny_tokenizers import make_sentencepiece, make_tiktoken_file

CPU = torch.device("cpu")
TEXT = "The quick brown fox, 12345 + 678 = 13023: café 你好 <end>"
IDS = torch.tensor([[5, 80, 17, 200, 33, 2, 9]])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(load_config(folder), device=CPU, dtype=dtype, ops=REFERENCE)
    load_weights(model, folder)
    return model


def our_logits(model: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, torch.arange(IDS.shape[1])[None]))


def their_logits(folder: Path) -> torch.Tensor:
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def make_meta_llama(folder: Path, place: str, make_tokenizer: Callable[[Path], int]) -> Path:
    """A base as Meta hands it out: params.json, consolidated.00.pth and tokenizer.model in the folder or in `place`."""
    inner = folder / place
    inner.mkdir(parents=True)
    vocab_size = make_tokenizer(inner / "tokenizer.model") + 256
    hf = make_tiny_llama(folder.parent / "hf", vocab_size=vocab_size, intermediate_size=96, tie_word_embeddings=False)
    written = write_layout(hf, folder.parent / "layout", "consolidated.00.pth")
    shutil.copyfile(written / "consolidated.00.pth", inner / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": vocab_size, "multiple_of": 32}
    (inner / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-6}), encoding="utf-8")
    return folder


def make_llama2_tokenizer(path: Path) -> int:
    make_sentencepiece(path)
    return 600


def perturb(model: CausalLM) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}],
)
def test_transformers_loads_what_was_saved_with_the_same_logits(
    tmp_path: Path, overrides: dict[str, Any], shard_bytes: int
) -> None:
    base, final = make_tiny_llama(tmp_path / "base", **overrides), tmp_path / "final"
    model = load(base)
    perturb(model)
    save_model(model.state_dict(), base, final, dtype=torch.float32, shard_bytes=shard_bytes)
    torch.testing.assert_close(their_logits(final), our_logits(model), rtol=1e-4, atol=1e-5)
    assert (our_logits(load(final)) == our_logits(model)).all()
    files = sorted(path.name for path in final.glob("*.safetensors"))
    written = [name for file in files for name in load_file(final / file)]
    assert sorted(written) == sorted(model.state_dict())
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)


def test_shards_stay_under_their_size_and_the_index_says_where_each_tensor_is(tmp_path: Path) -> None:
    base, final = make_tiny_llama(tmp_path / "base"), tmp_path / "final"
    state = load(base).state_dict()
    save_model(state, base, final, dtype=torch.float32, shard_bytes=20_000)
    index = json.loads((final / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    for path in final.glob("*.safetensors"):
        tensors = load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert len(set(index["weight_map"].values())) == len(list(final.glob("*.safetensors"))) > 2
    count = len(list(final.glob("*.safetensors")))
    assert (final / f"model-00001-of-{count:05}.safetensors").is_file()


def test_the_folder_carries_all_that_makes_it_a_model(tmp_path: Path) -> None:
    base, final = make_tiny_llama(tmp_path / "base"), tmp_path / "final"
    (base / "notes.txt").write_text("stays where it is", encoding="utf-8")
    save_model(load(base).state_dict(), base, final, dtype=torch.bfloat16)
    assert {path.name for path in final.iterdir()} == {path.name for path in base.iterdir()} - {"notes.txt"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (final / name).read_bytes() == (base / name).read_bytes()
    messages = [{"role": "user", "content": "hello"}]
    loaded, original = (AutoTokenizer.from_pretrained(folder) for folder in (final, base))
    assert loaded.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    assert loaded("hello <|im_end|>")["input_ids"] == original("hello <|im_end|>")["input_ids"]


def test_a_base_without_a_template_gets_the_default_one_written_beside_its_weights(tmp_path: Path) -> None:
    base, final = make_tiny_llama(tmp_path / "base"), tmp_path / "final"
    (base / "chat_template.jinja").unlink()
    save_model(load(base).state_dict(), base, final, dtype=torch.float32)
    messages = [{"role": "user", "content": "hello"}]
    text = AutoTokenizer.from_pretrained(final).apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|><|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_config_and_file_say_the_dtype_that_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    base, final = make_tiny_llama(tmp_path / "base"), tmp_path / "final"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float64"}), encoding="utf-8")
    model = load(base)
    save_model(model.state_dict(), base, final, dtype=dtype)
    written = json.loads((final / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    assert written == config | {"dtype": name, "torch_dtype": name}
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(final).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_dtype_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_tiny_llama(tmp_path)
    model = load(folder, dtype)
    on_disk = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == on_disk.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert (tensor == on_disk[name].to(dtype)).all()


def test_the_memory_that_the_model_has_is_filled_in_place(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, num_hidden_layers=4)
    model = build_model(load_config(folder), device=CPU, dtype=torch.float32, ops=REFERENCE)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_weights(model, folder)
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_loaded_weights_do_not_follow_the_file(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path)
    model = load(folder)
    before = weights_hash(model.state_dict())
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    assert weights_hash(model.state_dict()) == before


def test_a_model_of_another_shape_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    small, large = make_tiny_llama(tmp_path / "small"), make_tiny_llama(tmp_path / "large", intermediate_size=72)
    model = load(small)
    before = weights_hash(model.state_dict())
    with pytest.raises(UserError, match=r"gate_proj\.weight is 72x32 and should be 64x32"):
        load_weights(model, large)
    assert weights_hash(model.state_dict()) == before


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_hold_another_head(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in load(folder, torch.bfloat16).state_dict()
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"an lm_head\.weight unlike its embedding, but tie_word_embeddings is true"):
        load(folder)


@pytest.mark.parametrize("layout", ["pytorch_model.bin.index.json", "hf_model.pt", "torchtune_model.pt"])
def test_transformers_loads_what_was_saved_from_a_base_in_another_layout(tmp_path: Path, layout: str) -> None:
    base = write_layout(make_tiny_llama(tmp_path / "safetensors"), tmp_path / "base", layout)
    model = load(base)
    perturb(model)
    save_model(model.state_dict(), base, tmp_path / "final", dtype=torch.float32)
    torch.testing.assert_close(their_logits(tmp_path / "final"), our_logits(model), rtol=1e-4, atol=1e-5)
    assert [path.name for path in (tmp_path / "final").iterdir() if path.suffix in (".bin", ".pt")] == []


@pytest.mark.parametrize("place", ["", "original"])
def test_a_model_of_meta_with_a_tiktoken_file_is_published_as_hugging_face_has_it(tmp_path: Path, place: str) -> None:
    base = make_meta_llama(tmp_path / "base", place, make_tiktoken_file)
    model = load(base)
    save_model(model.state_dict(), base, tmp_path / "final", dtype=torch.float32)
    torch.testing.assert_close(their_logits(tmp_path / "final"), our_logits(model), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "final" / place / "tokenizer.model").read_bytes() == (
        base / place / "tokenizer.model"
    ).read_bytes()
    ours, theirs = load_tokenizer(base), AutoTokenizer.from_pretrained(tmp_path / "final")
    for text in (TEXT, "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos_token, ours.eos_token)
    messages = [{"role": "user", "content": "Hello"}]
    template = load_template(base, ours)
    assert theirs.apply_chat_template(messages, tokenize=False) == template.render(
        messages, add_generation_prompt=False
    )


@pytest.mark.parametrize("place", ["", "original"])
def test_a_sentencepiece_file_goes_where_transformers_reads_it(tmp_path: Path, place: str) -> None:
    base = make_meta_llama(tmp_path / "base", place, make_llama2_tokenizer)
    save_model(load(base).state_dict(), base, tmp_path / "final", dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "final")
    ours = load_tokenizer(base)
    assert theirs.encode(TEXT) == ours.encode(TEXT) == load_tokenizer(tmp_path / "final").encode(TEXT)
    assert not (tmp_path / "final" / "tokenizer.json").exists()


@pytest.mark.parametrize("make_tokenizer", [make_tiktoken_file, make_llama2_tokenizer])
def test_the_tokenizer_that_was_trained_with_is_published_in_place_of_the_bases_own(
    tmp_path: Path, make_tokenizer: Callable[[Path], int]
) -> None:
    file = tmp_path / "elsewhere.model"
    base = make_tiny_llama(tmp_path / "base", vocab_size=make_tokenizer(file) + 256)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    save_model(load(base).state_dict(), base, tmp_path / "final", dtype=torch.float32, tokenizer_file=file)
    used = load_tokenizer(base, file)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").encode(TEXT, add_special_tokens=False) == used.encode(
        TEXT, add_special_tokens=False
    )
    template = load_template(tmp_path / "final", load_tokenizer(tmp_path / "final"))
    messages = [{"role": "user", "content": "Hello"}]
    expected = load_template(base, used).encode(messages, add_generation_prompt=True)
    assert template.encode(messages, add_generation_prompt=True) == expected
    assert used.encode(TEXT) != load_tokenizer(base).encode(TEXT)


def test_nothing_is_published_when_the_weights_do_not_fit_the_config(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    state = load(base).state_dict()
    extra = state | {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2)}
    missing = {name: tensor for name, tensor in state.items() if "norm" not in name}
    for wrong, reason in ((extra, "leaves no place for"), (missing, "lacks the tensors")):
        with pytest.raises(UserError, match=reason):
            save_model(wrong, base, tmp_path / "final", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_published_folder_is_never_written_again(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    state = load(base).state_dict()
    save_model(state, base, tmp_path / "final", dtype=torch.float32)
    with pytest.raises(FileExistsError):
        save_model(state, base, tmp_path / "final", dtype=torch.float32)


def test_the_hash_knows_every_bit_and_not_the_files(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    state = load(base).state_dict()
    save_model(state, base, tmp_path / "one", dtype=torch.float32)
    save_model(dict(reversed(state.items())), base, tmp_path / "many", dtype=torch.float32, shard_bytes=20_000)
    hashes = {weights_hash(load(tmp_path / name).state_dict()) for name in ("base", "one", "many")}
    assert hashes == {weights_hash(state)} == {weights_hash(dict(reversed(state.items())))}
    assert len(weights_hash(state)) == 16
    assert weights_hash(load(base, torch.bfloat16).state_dict()) not in hashes
    state["model.norm.weight"][-1] = torch.nextafter(state["model.norm.weight"][-1], torch.tensor(9.0))
    assert weights_hash(state) not in hashes
