"""What an answer must look like, as OpenAI's and vLLM's clients say it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.strict import Strict

MAX_CHOICES = 1024


class JsonSchemaFormat(Strict):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool = Field(alias="schema")
    """A JSON schema; bounded in size, and checked before the answer begins."""
    strict: bool | None = None
    """The answer follows the schema in any case."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            needs = "needs" if self.json_schema is None else "takes no"
            raise ValueError(f"type {self.type} {needs} json_schema")
        return self


class StructuredOutputs(Strict):
    """Exactly one of them."""

    json_schema: str | dict[str, Any] | bool | None = Field(None, alias="json")
    """A JSON schema, as an object or as text."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A grammar in Lark's form."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = f"found {', '.join(given)}" if given else "found none"
            raise ValueError(f"exactly one of json, json_object, regex, choice, grammar is needed; {found}")
        return self
