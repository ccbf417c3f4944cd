"""A run's data: every record as token ids, with the positions whose tokens are trained. Torch-free."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lm.errors import UserError
from lm.template import ChatTemplate
from lm.tokenizer import Tokenizer
from trainer.data.errors import DataError
from trainer.data.examples import Example
from trainer.data.records import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    training: Sequence[Example]
    validation: Sequence[Example]
    truncated: int
    """Records that were longer than max_seq_len."""
    longest: int
    """Tokens of the longest record, before it was cut."""
    formats: Mapping[str, int]
    """How many records were written in which form."""
    warnings: Sequence[str]

    def report(self) -> dict[str, int]:
        return {
            "records": len(self.training),
            "tokens": sum(len(example.ids) for example in self.training),
            "trained_tokens": sum(len(example.trained) for example in self.training),
            "truncated": self.truncated,
            "longest": self.longest,
            "validation_records": len(self.validation),
        }


def load_dataset(
    records: Iterable[Record],
    template: ChatTemplate,
    *,
    max_seq_len: int,
    train_on_input: bool,
    validation_split: float,
    seed: int,
) -> Dataset:
    """Tokenize `records` and hold some out. Raises DataError that names the record, or says that nothing is left."""
    examples: list[Example] = []
    untrained: list[str] = []
    unused_columns: dict[str, None] = {}
    lengths: list[int] = []
    formats: Counter[str] = Counter()
    for record in records:
        ids, mask = _encode(record, template, train_on_input)
        example = Example(array("i", ids[:max_seq_len]), _trained_positions(mask[:max_seq_len]))
        lengths.append(len(ids))
        formats[record.data_format] += 1
        unused_columns.update(dict.fromkeys(record.unused_columns))
        if example.trained:
            examples.append(example)
        else:
            untrained.append(record.where)
    _check_trainable(examples, untrained, max_seq_len)
    training, validation = _split(examples, validation_split, seed)
    return Dataset(
        training=training,
        validation=validation,
        truncated=sum(length > max_seq_len for length in lengths),
        longest=max(lengths),
        formats=formats,
        warnings=_warnings(untrained, len(lengths), list(unused_columns), max_seq_len),
    )


def _encode(record: Record, template: ChatTemplate, train_on_input: bool) -> tuple[list[int], list[bool]]:
    if record.text is not None:
        return _encode_text(record.text, template.tokenizer)
    try:
        return template.encode_with_mask(record.messages, train_on_input=train_on_input)
    except UserError as error:
        raise DataError(f"{record.where}: {error}") from error


def _encode_text(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The text as this tokenizer begins one, with the end of sequence behind it, which it may write itself."""
    ids = tokenizer.encode(text)
    end = list(tokenizer.eos_token_ids[:1])
    if ids[-1:] != end:
        ids = ids + end
    return ids, [True] * len(ids)


def _trained_positions(mask: list[bool]) -> array[int]:
    return array("i", [position for position, trained in enumerate(mask) if trained and position > 0])


def _check_trainable(examples: list[Example], untrained: list[str], max_seq_len: int) -> None:
    if not examples:
        raise DataError(
            f"no record has a token to train on: within max_seq_len={max_seq_len} tokens all {len(untrained)} hold "
            "nothing but their prompt; raise max_seq_len or shorten the prompts",
            param="max_seq_len",
        )


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out `share` of the examples, at least one, drawn by `seed`."""
    if share == 0:
        return examples, []
    count = max(1, round(share * len(examples)))
    if count == len(examples):
        raise DataError(
            f"validation_split={share} leaves nothing to train on: there is only {count} record",
            param="validation_split",
        )
    held_out = set(random.Random(seed).sample(range(len(examples)), count))
    training = [example for index, example in enumerate(examples) if index not in held_out]
    return training, [examples[index] for index in sorted(held_out)]


def _warnings(untrained: list[str], num_records: int, unused_columns: list[str], max_seq_len: int) -> list[str]:
    warnings = []
    if untrained:
        warnings.append(
            f"left out {len(untrained)} of {num_records} records: within max_seq_len={max_seq_len} tokens there is "
            f"nothing but the prompt; the first is {untrained[0]}"
        )
    if unused_columns:
        warnings.append(f"columns that are not used: {', '.join(unused_columns[:20])}")
    return warnings
