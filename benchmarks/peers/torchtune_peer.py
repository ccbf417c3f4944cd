"""torchtune 0.6.1's own single-device recipes on tokenized records. Runs in the peers' environment, not in ours.

python torchtune_peer.py JOB.json    prints {"trained_tokens_per_second": ..., "peak_memory_bytes": ...}
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torchtune
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset

RECIPES = {
    "full": ("full_finetune_single_device.py", "FullFinetuneRecipeSingleDevice"),
    "lora": ("lora_finetune_single_device.py", "LoRAFinetuneRecipeSingleDevice"),
}
STEPS: list[tuple[float, float]] = []
"""For each step when it was told, and its trained tokens per second."""


class Tokenized(Dataset):
    def __init__(self, path: str) -> None:
        self.records = [json.loads(line) for line in Path(path).read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        record = self.records[index]
        labels = [i if trained else -100 for i, trained in zip(record["ids"], record["mask"], strict=True)]
        return {"tokens": record["ids"], "labels": labels}


def dataset(tokenizer: Any, *, path: str, packed: bool, max_seq_len: int) -> Dataset:
    records = Tokenized(path)
    return PackedDataset(records, max_seq_len=max_seq_len, padding_idx=0) if packed else records


class Tokenizer:
    """Records come as ids; all that the recipe asks of a tokenizer is the padding."""

    pad_id = 0


class StepTimes:
    """In the place of a metric logger."""

    def log_config(self, config: DictConfig) -> None:
        STEPS.append((time.perf_counter(), 0.0))

    def log_dict(self, payload: dict[str, float], step: int) -> None:
        STEPS.append((time.perf_counter(), float(payload["tokens_per_second_per_gpu"])))

    def close(self) -> None:
        pass


def config(job: dict[str, Any]) -> DictConfig:
    shape = {
        "vocab_size": 49152,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "embed_dim": 576,
        "intermediate_dim": 1536,
        "max_seq_len": 8192,
        "rope_base": 100_000,
    }
    lora = {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 8,
        "lora_alpha": 16,
    }
    is_lora = job["recipe"] == "lora"
    component = f"torchtune.models.llama3_2.{'lora_' if is_lora else ''}llama3_2"
    return OmegaConf.create(
        {
            "output_dir": job["output_dir"],
            "model": {"_component_": component, **(lora if is_lora else {}), **shape},
            "tokenizer": {"_component_": "torchtune_peer.Tokenizer"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": job["model"],
                "checkpoint_files": ["model.safetensors"],
                "output_dir": job["output_dir"],
                "model_type": "LLAMA3_2",
            },
            "dataset": {
                "_component_": "torchtune_peer.dataset",
                "path": job["records"],
                "packed": job["packed"],
                "max_seq_len": job["max_seq_len"],
            },
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 1,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "metric_logger": {"_component_": "torchtune_peer.StepTimes"},
            "resume_from_checkpoint": False,
            "save_adapter_weights_only": True,
            "seed": 0,
            "shuffle": True,
            "batch_size": job["batch_size"],
            "gradient_accumulation_steps": 1,
            "clip_grad_norm": 1.0,
            "epochs": 1,
            "max_steps_per_epoch": None,
            "optimizer_in_bwd": False,
            "compile": False,
            "enable_activation_checkpointing": False,
            "device": "cpu",
            "dtype": "fp32",
        }
    )


def load_recipe(name: str) -> Any:
    """The class out of the file that `tune run` would run; its folder may not be imported as a package."""
    file, class_name = RECIPES[name]
    path = Path(torchtune.__file__).parent.parent / "recipes" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, class_name)


def main() -> None:
    sys.modules["torchtune_peer"] = sys.modules["__main__"]  # the components above are looked up by name
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = config(job)
    recipe_class = load_recipe(job["recipe"])
    recipe_class.save_checkpoint = lambda self, epoch: None  # what is measured is training
    recipe = recipe_class(cfg=settings)
    recipe.setup(cfg=settings)
    recipe.train()
    spans = [(end - start, rate) for (start, _), (end, rate) in itertools.pairwise(STEPS[1:])]
    tokens, seconds = sum(span * rate for span, rate in spans), sum(span for span, _ in spans)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"trained_tokens_per_second": tokens / seconds, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
