"""The table of families. A new one is its folder and its line here."""

from __future__ import annotations

from typing import Any

from vlmo_ds.config import RecipeError, nearest
from vlmo_ds.families import beit3, blip, coca, vlmo, vqkd
from vlmo_ds.families.interface import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (vlmo.FAMILY, coca.FAMILY, blip.FAMILY, beit3.FAMILY, vqkd.FAMILY)
}
DEFAULT = vlmo.FAMILY  # of a recipe that names neither an architecture nor a family


def of_model(model: Any) -> Family:
    """The family of a recipe's `model`, by `family` or by `arch`. RecipeError where there is none of that name."""
    settings = model if isinstance(model, dict) else {}
    if (name := settings.get("family")) is not None:
        if str(name) not in FAMILIES:
            raise RecipeError(
                f"model.family is {name!r}{nearest(str(name), FAMILIES)}; accepted: {', '.join(FAMILIES)}"
            )
        return FAMILIES[str(name)]
    arch = str(settings.get("arch"))
    return next((family for family in FAMILIES.values() if arch in family.config.architectures), DEFAULT)
