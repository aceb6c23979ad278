"""transformers has no visual tokenizer of this kind."""

from __future__ import annotations

from typing import Any

from vlmo_ds.config import RecipeError


def exported(*args: Any) -> Any:
    raise RecipeError(
        "transformers has no model of this kind; model.safetensors of the stage's final folder has the official parameter names, which the "
        "reference's code loads"
    )
