"""Which class trains by which recipe."""

from __future__ import annotations

from trainer.config import Recipe as RecipeName
from trainer.dpo import DpoRecipe
from trainer.recipe import Recipe
from trainer.supervised import SupervisedRecipe

RECIPES: dict[RecipeName, type[Recipe]] = {"full": SupervisedRecipe, "lora": SupervisedRecipe, "dpo": DpoRecipe}
