"""Finished runs, opened by what is asked of their models."""

from __future__ import annotations

from pathlib import Path

from vlmo_ds.config import Recipe, RecipeError
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.recipe_file import load_recipe
from vlmo_ds.weights_file import BEST, EMA, FINAL, RESULTS, read_weights


def find_stage(path: Path, call: str | None = None, weights: str | None = None) -> tuple[Path, Recipe, Path]:
    """(run, recipe, folder of weights) of a run's directory, whose last finished stage that trains this call of the model (None:
    any) is taken, or of checkpoints/<stage>/final inside it. weights: which of RESULTS, None: final, or what the path names."""
    named = path.name in RESULTS and path.resolve().parents[1].name == "checkpoints"
    if named and weights not in (None, path.name):
        raise RecipeError(f"--weights {weights} asks for other weights than {path}; accepted: one of them")
    run = path.resolve().parents[2] if named else path
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{path} is no run: it has no recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml")
    if named:
        if path.parent.name not in [stage.name for stage in recipe.stages]:
            raise RecipeError(f"{path} is no stage of its run's recipe ({', '.join(s.name for s in recipe.stages)})")
        stage = next(stage for stage in recipe.stages if stage.name == path.parent.name)
        if call is not None and call not in stage.gives:
            raise RecipeError(f"{path} was trained for {', '.join(stage.tasks)}; {wanted_for(recipe, call)}")
        return run, recipe, path
    weights = weights or FINAL
    for stage in reversed(recipe.stages):
        folder = run / "checkpoints" / stage.name / weights
        if (call is None or call in stage.gives) and folder.is_dir():
            return run, recipe, folder
    stages = "; ".join(f"{stage.name}: {', '.join(stage.tasks)}" for stage in recipe.stages)
    wanted = "" if call is None else f" that trains what is asked ({wanted_for(recipe, call)})"
    what = {
        FINAL: "finished stage",
        EMA: "stage with a moving average (ema)",
        BEST: "stage with a best score (evaluate.best)",
    }
    raise RecipeError(f"{run} has no {what[weights]}{wanted}; its recipe has {stages}")


def wanted_for(recipe: Recipe, call: str) -> str:
    """Which tasks train a call of the model, in words."""
    tasks = sorted(recipe.family.giving(call))
    return f"this needs the task {' or '.join(tasks)}" if tasks else f"no task of {recipe.family.name} trains this"


def load_model(recipe: Recipe, folder: Path) -> FamilyModel:
    """Weights of a stage, from a folder of it, in a plain module. RecipeError where they are not those of the recipe's model."""
    stage = next(stage for stage in recipe.stages if stage.name == folder.parent.name)
    model = recipe.family.build(recipe.model_of(stage), stage.weights, Collector())
    try:
        model.load_state_dict(read_weights(folder))
    except RuntimeError as error:  # torch's, of several lines
        raise RecipeError(
            f"{folder}: its weights are not those of the model in its recipe: {' '.join(str(error).split())[:400]}"
        ) from None
    return model.eval()
