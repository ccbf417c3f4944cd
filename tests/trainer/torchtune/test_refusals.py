"""What is refused, with its reason, and that nothing else gets through."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from tests.support.json_fuzz import any_text, junk
from tests.support.torchtune_configs import FULL, LORA, refusal, stock
from trainer.config import RunConfig
from trainer.strict import parse_options
from trainer.torchtune import translate
from trainer.torchtune.components import COMPONENTS
from trainer.torchtune.table import all_keys


@pytest.mark.parametrize(
    ("words", "param", "message"),
    [
        (["bacth_size=1"], "bacth_size", "did you mean batch_size"),
        (["model.lora_ranks=1"], "model.lora_ranks", "did you mean lora_rank"),
        (["model=torchtune.models.llama3.llama3_8b"], "model.lora_attn_modules", "unknown key"),
        (
            ["model={_component_: torchtune.models.llama3.llama3_8b}"],
            "model._component_",
            "take torchtune.models.llama3.lora",
        ),
        (["model=torchtune.models.llama3.qlora_llama3_8b"], "model._component_", "QLoRA"),
        (["model=torchtune.models.gemma2.gemma2_9b"], "model._component_", "no such family"),
        (["model=os.system"], "model._component_", "'os.system' is not in the list"),
        (["model={_component_: 7}"], "model._component_", "name of a component"),
        (["model=x", "model._component_=[x]"], "model._component_", "name of a component"),
        (["model={lora_rank: 8}"], "model._component_", "required"),
        (["model.quantize_base=True"], "model.quantize_base", "QLoRA"),
        (["model.use_dora=3"], "model.use_dora", "boolean"),
        (["model.lora_attn_modules=[null]"], "model.lora_attn_modules", "None is unknown"),
        (["model.apply_lora_to_mlp=3"], "model.apply_lora_to_mlp", "true or false"),
        (["model.lora_attn_modules=[o_proj]"], "model.lora_attn_modules", "output_proj"),
        (["model.lora_rank=0"], "model.lora_rank", "greater than or equal to 1"),
        (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas.1", "less than 1"),
        (["optimizer=torch.optim.SGD", "optimizer.nesterov=True"], "optimizer.nesterov", "plain momentum"),
        (["optimizer=torch.optim.SGD", "optimizer.momentum=2"], "optimizer.momentum", "less than 1"),
        (["optimizer.no_such_key=null"], "optimizer.no_such_key", "unknown key"),
        (["optimizer=torch.optim.RMSprop"], "optimizer._component_", "torch.optim.AdamW"),
        (["optimizer_in_bwd=True"], "optimizer_in_bwd", "remove clip_grad_norm"),
        (["optimizer_in_bwd=True", "clip_grad_norm=null"], "optimizer_in_bwd", "gradient_accumulation_steps: 1"),
        (["optimizer.lr=fast"], "optimizer.lr", "valid number"),
        (["lr_scheduler.num_cycles=2"], "lr_scheduler.num_cycles", "half a cosine"),
        (["~lr_scheduler.num_warmup_steps"], "lr_scheduler.num_warmup_steps", "required"),
        (["profiler.enabled=True"], "profiler.enabled", "write False"),
        (["loss=torch.nn.MSELoss"], "loss._component_", "not in the list"),
        (["metric_logger=torchtune.training.metric_logging.CometLogger"], "metric_logger._component_", "DiskLogger"),
        (
            ["metric_logger={_component_: torchtune.training.metric_logging.MLFlowLogger, tracking_uri: http://x}"],
            "metric_logger.tracking_uri",
            "MLFLOW_TRACKING_URI",
        ),
        (["~dataset.data_files"], "dataset.data_files", "required"),
        (["dataset.source=tatsu-lab/alpaca"], "dataset.source", "with data_files it is one of json"),
        (["dataset.source=/etc/passwd", "~dataset.data_files"], "dataset.source", "pattern"),
        (["dataset.packed=True"], "tokenizer.max_seq_len", "as in torchtune"),
        (["dataset.masking_strategy=train_on_none"], "dataset.masking_strategy", "train_on_all"),
        (["dataset=[a]"], "dataset.0", "mapping with _component_"),
        (["dataset=[]"], "dataset", "required"),
        (
            [
                (
                    "dataset=[{_component_: torchtune.datasets.alpaca_dataset, packed: True}, "
                    "{_component_: torchtune.datasets.alpaca_dataset, packed: False}]"
                )
            ],
            "dataset.1.packed",
            "it is False here, and True by dataset.0.packed",
        ),
        (
            [
                (
                    "dataset=[{_component_: torchtune.datasets.alpaca_dataset}, "
                    "{_component_: torchtune.datasets.instruct_dataset, data_files: a.json}]"
                )
            ],
            "dataset.1.train_on_input",
            "what is trained is 'assistant' here, and 'all' by dataset.0.train_on_input",
        ),
        (["dataset=torchtune.datasets.preference_dataset"], "dataset._component_", "takes no preferences"),
        (
            ["dataset_val={_component_: torchtune.datasets.text_completion_dataset}"],
            "dataset_val.data_files",
            "required",
        ),
        (["dataset=torchtune.datasets.multimodal.vqa_dataset"], "dataset._component_", "models of text"),
        (["loss=torchtune.rlhf.loss.DPOLoss"], "loss._component_", "for the dpo recipe"),
        (["tokenizer.prompt_template=os.path"], "tokenizer.prompt_template", "not in the list"),
        (["tokenizer.truncation_type=middle"], "tokenizer.truncation_type", "'left'"),
        (["tokenizer.max_seq_len=2"], "tokenizer.max_seq_len", "greater than or equal to 8"),
        (["checkpointer.checkpoint_files={a: b}"], "checkpointer.checkpoint_files.filename_format", "required"),
        (["checkpointer=torchtune.training.DistributedCheckpointer"], "checkpointer._component_", "one device"),
        (["~checkpointer"], "checkpointer", "required"),
        (["~dataset"], "dataset", "required"),
        (["dtype=fp16"], "dtype", "bf16 or fp32"),
        (["device=tpu"], "device", "tpu"),
        (["shuffle=False"], "shuffle", "write True"),
        (["max_steps_per_epoch=0"], "max_steps_per_epoch", "from 1"),
        (["seed=-1"], "seed", "greater than or equal to 0"),
        (["teacher_model=x"], "teacher_model", "distillation"),
        (["resume_from_checkpoint=3"], "resume_from_checkpoint", "true or false"),
        (["output_dir=[a]", "~metric_logger", "checkpointer.output_dir=1"], "checkpointer.output_dir", "folder"),
    ],
)
def test_what_is_not_done_is_refused_where_it_stands(words: list[str], param: str, message: str) -> None:
    error = refusal(stock(*words))
    assert message in str(error)
    assert error.param == param
    assert str(error).startswith(param)


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "builtins.eval", "torchtune.nothing", "antigravity"])
@pytest.mark.parametrize("place", COMPONENTS)
def test_a_dotted_path_is_never_imported(name: str, place: str) -> None:
    data = stock()
    data[place] = {"_component_": name}
    before = set(sys.modules)
    assert refusal(data).param == f"{place}._component_"
    assert set(sys.modules) == before


paths = st.sampled_from(sorted({f"{where}.{key.name}".lstrip(".") for where, keys in all_keys() for key in keys}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    changes=st.lists(st.tuples(paths | any_text, junk), max_size=4),
    recipe=st.sampled_from([FULL, LORA, "generate", None]),
)
def test_no_change_gets_past_as_anything_but_options_or_an_error_of_the_user(
    changes: list[tuple[str, Any]], recipe: str | None
) -> None:
    data: Any = stock()
    for path, value in changes:
        *parents, last = path.split(".")
        group = data
        for parent in parents:
            group = group.setdefault(parent, {}) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group[last] = value
    try:
        translation = translate(data, recipe=recipe)
    except UserError:
        return
    if recipe != "generate":
        parse_options(RunConfig, translation.options)
