"""Weights of any origin into a model: from the stage before, from a checkpoint, from a file of another code base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.families.interface import matches
from vlmo_ds.families.step import FamilyModel


def hand_over(model: FamilyModel, source: Mapping[str, Tensor], init: InitConfig, origin: str) -> dict[str, list[str]]:
    """Loads weights into a new stage's model. Every key on either side is accounted for.

    The model's family gives files of other code bases its names, and positions the model's shapes. Returns what became of
    the weights: {"loaded", "fresh", "dropped", "converted"}. Raises RecipeError for a key that is missing,
    unexpected, or of another shape, unless `init` names it.
    """
    own, weights = model.state_dict(), model.family.weights()
    source, converted = weights.convert(source, own, model.config, init)
    fresh_patterns = [*init.fresh, *weights.fresh(init)]
    loaded = [k for k in own if k in source and not matches(k, fresh_patterns)]
    fresh = [k for k in own if matches(k, fresh_patterns)]
    dropped = [k for k in source if k not in own and matches(k, [*init.drop, *fresh_patterns])]
    missing = [k for k in own if k not in source and k not in fresh]
    unexpected = [k for k in source if k not in own and k not in dropped]
    shapes = [k for k in loaded if own[k].shape != source[k].shape]
    problems = []
    if shapes:
        k = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape: {k} is {list(source[k].shape)} there and {list(own[k].shape)} in this model "
            "(a checkpoint of another architecture or vocabulary)"
        )
    if missing:
        problems.append(f"{len(missing)} missing there: {brief(missing)} (name them in init.fresh to start them fresh)")
    if unexpected:
        problems.append(
            f"{len(unexpected)} that this stage does not have: {brief(unexpected)} (name them in init.drop to leave them)"
        )
    for pattern in init.fresh:
        if not any(matches(k, [pattern]) for k in own):
            problems.append(f"init.fresh: '{pattern}' fits no weight of this model")
    if problems:
        raise RecipeError(f"weights from {origin} do not fit:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for k in loaded:
            own[k].copy_(source[k])
    weights.finish(model, init)
    return {"loaded": loaded, "fresh": fresh, "dropped": dropped, "converted": converted}


def brief(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
