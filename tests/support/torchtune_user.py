"""What a torchtune user brings, tiny: a Llama as it is downloaded, with Meta's tokenizer file, a data set, a YAML file.

`python -m tests.support.torchtune_user HOME` makes it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.tiny import make_tiny_llama
from tests.support.tiny_tokenizers import make_tiktoken_file
from tests.support.torchtune_home import TorchtuneUser

NUM_SPECIAL_TOKENS = 256


def make_torchtune_user(home: Path, **model_overrides: Any) -> TorchtuneUser:
    """Overrides are LlamaConfig's arguments."""
    user = TorchtuneUser(home)
    user.tokenizer_file.parent.mkdir(parents=True)
    num_ranks = make_tiktoken_file(user.tokenizer_file)
    _make_model(user.model, num_ranks, model_overrides)
    user.write_data_and_config()
    return user


def _make_model(folder: Path, num_ranks: int, overrides: dict[str, Any]) -> None:
    """config.json and weights in Hugging Face's form; of the tokenizer, only Meta's file."""
    ends = [num_ranks + 1, num_ranks + 8, num_ranks + 9]  # <|end_of_text|>, <|eom_id|>, <|eot_id|>
    shape = {"vocab_size": num_ranks + NUM_SPECIAL_TOKENS, "max_position_embeddings": 1024, "rope_theta": 500000.0}
    ids = {"bos_token_id": num_ranks, "eos_token_id": ends, "pad_token_id": None}
    make_tiny_llama(folder, **{**shape, **ids, **overrides})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    generation = {"bos_token_id": num_ranks, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


if __name__ == "__main__":
    make_torchtune_user(Path(sys.argv[1]))
