"""Where a run begins: at its base, at an adapter that is trained further, or at one that is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm.adapter import save_adapter
from lm.device import choose_dtype
from lm.errors import UserError
from lm.lora import LoraLinear, LoraSpec, lora_parameters, spec_of
from lm.model import CausalLM
from lm.template import load_template
from lm.tokenizer import load_tokenizer
from tests.support.adapters import CPU, DORA, adapted, load, logits
from tests.support.runs import make_run, train_here
from tests.support.tiny import make_tiny_llama
from tests.trainer.test_resume import pausing_at
from trainer.config import RunConfig, load_run_config
from trainer.model_setup import load_model, merged_model, prepare_base
from trainer.outcome import Paused
from trainer.run_folder import RunFolder

FP32 = choose_dtype("fp32", CPU)
SPEC = LoraSpec(rank=3, alpha=5.0, dropout=0.0, target_modules=("q_proj", "down_proj"))

PAIRS = [{"prompt": f"Who {n}?", "chosen": "Tuna.", "rejected": "A cat" + "!" * n} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "start"
    save_adapter(adapted(base, SPEC), folder, base_model="base")
    return folder


def begin(folder: Path, base: Path, **options: Any) -> tuple[RunFolder, RunConfig, CausalLM]:
    run = make_run(folder, base, **options)
    config = load_run_config(run.config)
    model = load_model(config, prepare_base(config, run, torch.float32), device=CPU, precision=FP32)
    return run, config, model


def trained(model: CausalLM) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def difference(model: CausalLM, other: CausalLM) -> float:
    return (logits(model.eval()) - logits(other.eval())).abs().max().item()


def test_an_adapter_is_trained_further_with_its_own_rank_and_targets(tmp_path: Path, base: Path, start: Path) -> None:
    run, _, model = begin(tmp_path / "run", base, start_adapter=str(start), lora={"dropout": 0.2})
    assert spec_of(model) == LoraSpec(rank=3, alpha=5.0, dropout=0.2, target_modules=("down_proj", "q_proj"))
    assert difference(model, adapted(base, SPEC)) < 1e-4
    merged = adapted(base, SPEC).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in model.state_dict().items())
    assert trained(model) == set(lora_parameters(model))
    assert not run.base.exists()


@pytest.mark.parametrize("recipe", ["full", "dpo"])
def test_an_adapter_is_merged_where_the_whole_model_is_trained(
    tmp_path: Path, base: Path, start: Path, recipe: str
) -> None:
    _, _, model = begin(tmp_path / "run", base, recipe=recipe, start_adapter=str(start), dpo={"update": "full"})
    assert difference(model, adapted(base, SPEC)) < 1e-4
    assert trained(model) == {name for name, _ in model.named_parameters()} == set(load(base).state_dict())


def test_a_merged_start_is_the_base_of_a_new_adapter_and_a_model_folder_of_its_own(
    tmp_path: Path, base: Path, start: Path
) -> None:
    run, config, model = begin(tmp_path / "run", base, start_adapter=str(start), merge_start=True, lora={"rank": 2})
    assert spec_of(model).rank == 2
    assert difference(model, adapted(base, SPEC)) < 1e-4
    published = load(run.base).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in published.items())
    assert load_template(run.base, load_tokenizer(run.base)).encode([{"role": "user", "content": "hi"}])
    written = run.base.stat().st_mtime_ns
    assert prepare_base(config, run, torch.float32) == run.base
    assert run.base.stat().st_mtime_ns == written, "a resumed run takes the one that is there"


def test_dora_and_rank_stabilized_updates_are_made_as_the_options_say(tmp_path: Path, base: Path) -> None:
    _, _, model = begin(tmp_path / "run", base, lora={"use_dora": True, "use_rslora": True, "rank": 4, "alpha": 6})
    assert sum("magnitude" in name for name in trained(model)) == 2 * 7
    assert {module.scaling for module in model.modules() if isinstance(module, LoraLinear)} == {3.0}


def test_a_dora_adapter_is_merged_too(tmp_path: Path, base: Path) -> None:
    save_adapter(adapted(base, DORA), tmp_path / "dora", base_model="base")
    assert difference(merged_model(base, tmp_path / "dora"), adapted(base, DORA)) < 1e-4


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [("rank", 16, "3"), ("alpha", 4.0, "5.0"), ("target_modules", ["q_proj"], "'down_proj', 'q_proj'")],
)
def test_options_that_an_adapter_contradicts_are_refused(
    tmp_path: Path, base: Path, start: Path, option: str, value: Any, found: str
) -> None:
    with pytest.raises(
        UserError, match=rf"^lora.{option}: .* does not fit start_adapter, which has .*{found}"
    ) as caught:
        begin(tmp_path / "run", base, start_adapter=str(start), lora={option: value})
    assert caught.value.param == f"lora.{option}"


@pytest.mark.parametrize("options", [{}, {"recipe": "full"}, {"merge_start": True}], ids=str)
def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(
    tmp_path: Path, start: Path, options: dict[str, Any]
) -> None:
    other = make_tiny_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match=r"^start_adapter: .* does not fit the base model") as caught:
        begin(tmp_path / "run", other, start_adapter=str(start), **options)
    assert caught.value.param == "start_adapter"
    assert not RunFolder(tmp_path / "run").base.exists()


def test_every_so_many_th_layer_is_recomputed(tmp_path: Path, base: Path) -> None:
    options = {"enable_activation_checkpointing": True, "activation_checkpointing_interval": 2}
    _, _, model = begin(tmp_path / "run", base, **options)
    assert (model.checkpoint_activations, model.checkpoint_interval) == (True, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"merge_start": True}, {"merge_start": True, "recipe": "dpo", "records": PAIRS}, {"lora": {"use_dora": True}}],
    ids=["further", "merged", "merged for DPO", "DoRA of its own"],
)
def test_a_run_publishes_an_adapter_and_the_model_that_it_makes_of_its_base(
    tmp_path: Path, base: Path, start: Path, options: dict[str, Any]
) -> None:
    if "lora" not in options:
        options = {**options, "start_adapter": str(start)}
    run = make_run(tmp_path / "run", base, epochs=2, learning_rate=1e-2, **options)
    with pytest.raises(Paused):
        train_here(run, check=pausing_at(3))
    recipe = train_here(run, resume=True)
    beneath = run.base if options.get("merge_start") else base
    step = f"step_{recipe.plan.total_steps}"
    published = load(run.checkpoints / step)
    assert difference(published, recipe.model) < 1e-4
    assert difference(published, merged_model(beneath, run.adapters / step)) == 0
    assert difference(published, load(beneath)) > 0.01
