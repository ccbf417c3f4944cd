"""SmolLM2-135M-Instruct: our token ids beside transformers', of raw text and of chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lm.template import load_template
from lm.tokenizer import load_tokenizer
from tests.support.texts import random_contents, random_texts

pytestmark = pytest.mark.slow


def test_ids_of_text_equal_those_of_transformers(smollm2: Path) -> None:
    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in random_texts(500):
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_ids_of_chats_equal_those_of_transformers_and_begin_with_the_prompt_that_is_served(smollm2: Path) -> None:
    template = load_template(smollm2, load_tokenizer(smollm2))
    theirs: Any = AutoTokenizer.from_pretrained(smollm2)
    contents = random_contents(500)
    for question, answer in zip(contents, reversed(contents), strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, mask = template.encode_with_mask(messages, train_on_input=False)
        prompt = template.encode(messages[:1], add_generation_prompt=True)
        assert ids == theirs.apply_chat_template(messages)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert mask.index(True) == len(prompt)
