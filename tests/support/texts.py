"""Texts on which tokenizers tend to differ, the same ones in every run."""

from __future__ import annotations

import random

FRAGMENTS = (
    *("Hello", "world", " ", "  ", "\n", "\n\n", "\t", "\r\n", "12345", "3.14", "don't", "naïve", "e\u0301", "ﬁ"),
    *("你好", "世界", "人工智能", "。", ",", "日本語", "한국어", "العربية", "🙂", "👩‍👩‍👧", "🤖"),
    *("\u200b", "\ufeff", "\x00", "\x01\x1b[0m\x7f", "\x85", "\u3000", "     ", "\t\t", " \n \n", "▁"),
    *("a\u0300\u0301\u0327", "क्षि", "ไม้"),
    *("def f(x):\n    return x", "{'a': [1]}", "<b>&amp;</b>", "==", "#!/bin/sh", "C:\\n", "https://a.b/c?d=e", "Ġ"),
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>", "<unk>", "<|im_end", "[INST]"),
    *("<|end_of_text|>", "<|reserved_special_token_7|>", "<|python_tag|>"),
)


def random_texts(count: int) -> list[str]:
    """Texts of 0 to 12 fragments each, every third with random code points in between."""
    rng = random.Random(7)
    texts = []
    for index in range(count):
        parts = rng.choices(FRAGMENTS, k=rng.randrange(13))
        if index % 3 == 0:
            parts += [chr(rng.choice((rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(4)]
            rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


def random_contents(count: int) -> list[str]:
    """Contents that do not begin with white space, which may merge with the white space that the template writes."""
    rng = random.Random(3)
    pieces = ["a", "Hello", " world", "\n", "\n\n", "  ", "你好", "🙂", "12", "=", "\t", ".", "é", "</s>", "<|eot_id|>"]
    return [rng.choice("xY1你🙂(") + "".join(rng.choices(pieces, k=rng.randrange(8))) for _ in range(count)]
