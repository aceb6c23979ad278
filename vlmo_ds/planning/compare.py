"""Whether a run learns as others have: its curves beside those of runs that went well.

    vlmo compare RUN [REFERENCE ...] [--page FILE]
    vlmo compare RUN REFERENCE ... --record FILE

REFERENCE: runs, or a file of recorded curves; without one, the recorded curves that come with the project for a recipe with the same stages
and tasks (launch/references). Of each metric a band is made: the least and the most of the reference's runs over neighbouring stretches of
steps, and a margin. A metric is outside where three stretches one after another are. Exit status: 0 inside, 1 outside, 2 a run or file that
cannot be used.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError, model_validator

from vlmo_ds import __version__, metrics, shipped
from vlmo_ds.config import Recipe, RecipeError
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.evaluation.drawing import STYLE, curve
from vlmo_ds.recipe_file import changed_settings, load_recipe, parse_recipe

POINTS, LEAST_STEPS = 32, 8  # stretches of a stage at most, and steps of one
STREAK = 3  # stretches outside, one after another, that make a metric outside
SPREAD, RELATIVE = 0.5, 0.1  # of the margin: of the runs' spread, and of the value by the root of the number of runs
DRAWN = {"grad_norm", "skipped_steps", "data/replaced"}  # and not judged: noisy, of fp16, of the data's files
LEFT_OUT = {"stage", "step", "step_of_run", "loss", "data/epoch"}  # "loss" is the sum of what is compared one by one
RATE = "lr"
Curves = Mapping[str, Mapping[str, Mapping[int, float | None]]]  # stage -> metric -> step -> value, None: not finite
SHOWN = 8  # settings that differ, and metrics of a stage


class Band(NamedTuple):
    """Of one stretch of steps."""

    low: float
    high: float


class StageCurves(BaseModel):
    """Of one stage: the last step of each stretch, and metric -> for each run its mean over each stretch (null: none that is finite)."""

    steps: list[int]
    metrics: dict[str, list[list[float | None]]]

    @model_validator(mode="after")
    def check(self) -> StageCurves:
        if not self.steps or self.steps != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError("steps are not rising")
        for name, runs in self.metrics.items():
            if not runs or any(len(run) != len(self.steps) for run in runs):
                raise ValueError(f"{name} has not a value for each of the {len(self.steps)} stretches in every run")
        return self

    def band(self, name: str) -> list[Band | None]:
        """Of each stretch; None where no run has a number nearby."""
        runs = self.metrics[name]
        bands: list[Band | None] = []
        for i in range(len(self.steps)):
            near = [v for run in runs for v in run[max(i - 1, 0) : i + 2] if v is not None]
            if not near:
                bands.append(None)
                continue
            low, high = min(near), max(near)
            margin = SPREAD * (high - low) + RELATIVE / math.sqrt(len(runs)) * max(abs(low), abs(high))
            bands.append(Band(low - margin, high + margin))
        return bands

    def usual(self, name: str, stretch: int) -> float:
        """Median of the runs; 0 where none has a number."""
        return median([run[stretch] or 0.0 for run in self.metrics[name]])


class Reference(BaseModel):
    """Recorded curves. recipe: as it was resolved; runs: name, seed and precision of each; recorded_by: the version that did."""

    recorded_by: str
    recipe: dict[str, Any]
    runs: list[dict[str, Any]]
    stages: dict[str, StageCurves]


class Finding(NamedTuple):
    """A metric that is outside. side: above or below; value and band at its first stretch; ratio: of the value to the reference's, the median
    over the stretches outside."""

    stage: str
    metric: str
    side: str
    step: int
    value: float
    band: Band
    ratio: float


class Compared(NamedTuple):
    """outside: in the order of the stages; inside: (stage, metric); points: stage -> how many stretches the run has of the reference's."""

    outside: list[Finding]
    inside: set[tuple[str, str]]
    points: dict[str, int]


def read_curves(run: Path) -> Curves:
    """Of a run's metrics.jsonl. RecipeError where there is none."""
    file = run / metrics.FILE
    if not file.is_file():
        raise RecipeError(f"{run} is no run: it has no {metrics.FILE}")
    stages: dict[str, dict[str, dict[int, float | None]]] = {}
    for record in metrics.records(file):
        for name, value in record.items():
            if name not in LEFT_OUT and (value is None or isinstance(value, (int, float))):
                stages.setdefault(record["stage"], {}).setdefault(name, {})[record["step"]] = value
    if not stages:
        raise RecipeError(f"{file} has no record of a step yet")
    return stages


def stretches(last: int) -> list[int]:
    """The last step of each stretch of a stage of so many steps."""
    size = max(-(-last // POINTS), min(LEAST_STEPS, last))
    return list(range(size, last + 1, size))


def means(values: Mapping[int, float | None], steps: Sequence[int]) -> list[float | None]:
    """Over the steps up to each of `steps`, as far as the values go to its end; None where one is not finite (null) or missing."""
    found: list[float | None] = []
    for first, last in zip([0, *steps[:-1]], steps, strict=True):
        inner = [values.get(step) for step in range(first + 1, last + 1)]
        numbers = [value for value in inner if value is not None]
        found.append(sum(numbers) / len(numbers) if len(numbers) == len(inner) else None)
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def recorded(runs: Sequence[Path]) -> Reference:
    """The curves of runs of one recipe, which may differ in their seeds, names and data."""
    recipe = recipe_of(runs[0])
    curves = [read_curves(run) for run in runs]
    for run in runs[1:]:
        if differing := differences(recipe_of(run), recipe):
            raise RecipeError(f"{run} is no run of the recipe of {runs[0]}: {differing[0]}")
    stages = {}
    for stage in curves[0]:
        if lacking := [str(run) for run, of in zip(runs, curves, strict=True) if stage not in of]:
            raise RecipeError(f"{lacking[0]} has no stage '{stage}', which {runs[0]} has")
        last = min(max(max(values) for values in of[stage].values()) for of in curves)
        steps = stretches(last)
        names = [name for name in curves[0][stage] if all(name in of[stage] for of in curves)]
        stages[stage] = StageCurves(
            steps=steps,
            metrics={name: [[rounded(v) for v in means(of[stage][name], steps)] for of in curves] for name in names},
        )
    about = [{"name": run.name, "seed": recipe_of(run).seed, "precision": precision_of(run)} for run in runs]
    return Reference(
        recorded_by=f"vlmo_ds {__version__}", recipe=recipe.model_dump(mode="json"), runs=about, stages=stages
    )


def precision_of(run: Path) -> str:
    """bf16, fp16 or float32, by the DeepSpeed config of its stages; "" where it cannot be told."""
    try:
        stages = json.loads((run / "ds_config.json").read_text()).values()
        found = {name for config in stages for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True}
    except (OSError, ValueError, AttributeError):
        return ""
    return ", ".join(sorted(found)) or "float32"


def recipe_of(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


def read_reference(path: Path) -> Reference:
    try:
        return Reference.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{path} holds no recorded curves{f' ({where})' if where else ''}: {first['msg']}") from None


def write_reference(path: Path, reference: Reference) -> None:
    """One line for each run's curve, so that changes can be read."""

    def lines(value: Any, depth: int) -> str:
        if depth and isinstance(value, dict) and value:
            pad = " " * (5 - depth)
            inner = (f"{pad}{json.dumps(key)}: {lines(inner, depth - 1)}" for key, inner in value.items())
            return "{\n" + ",\n".join(inner) + "\n" + pad[:-1] + "}"
        return json.dumps(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (lines(reference.model_dump(mode="json"), 4) + "\n").encode())


def shipped_reference(recipe: Recipe) -> tuple[Reference, Path]:
    """The recorded curves of the recipe with the same stages and tasks."""
    for name in shipped.names("references"):
        path = shipped.find("references", name)
        reference = read_reference(path)
        if outline(parse_recipe(reference.recipe, str(path))) == outline(recipe):
            return reference, path
    known = ", ".join(shipped.names("references"))
    raise RecipeError(
        f"no recorded curves have the stages and tasks of recipe '{recipe.name}'; there are some of {known}; name runs that went well, as in "
        "vlmo compare RUN RUN1 RUN2, or a file that --record has written"
    )


def outline(recipe: Recipe) -> tuple:
    return recipe.family.name, tuple((stage.name, tuple(sorted(stage.tasks))) for stage in recipe.stages)


def differences(recipe: Recipe, reference: Recipe) -> list[str]:
    """Settings that make other curves than the reference's."""
    changed = changed_settings(reference, recipe)
    return [f"{key} {now!r}, in the reference {then!r}" for key, (then, now) in changed.items() if key != "seed"]


def compare(curves: Curves, reference: Reference) -> Compared:
    """A run in the middle of a stage is compared as far as it is."""
    found = Compared([], set(), {})
    for stage, expected in reference.stages.items():
        if stage not in curves:
            continue
        last = max(max(values) for values in curves[stage].values())
        found.points[stage] = sum(step <= last for step in expected.steps)
        for name in expected.metrics:
            if name in DRAWN or name not in curves[stage]:
                continue
            finding = judge(stage, name, curves[stage][name], expected)
            if finding:
                found.outside.append(finding)
            else:
                found.inside.add((stage, name))
    return found


def judge(stage: str, name: str, values: Mapping[int, float | None], expected: StageCurves) -> Finding | None:
    """The first streak outside; on the better side, which a run may reach sooner than others did, the one that it ends with."""
    bands, found = expected.band(name), means(values, expected.steps)
    points = [
        (i, value, band) for i, (value, band) in enumerate(zip(found, bands, strict=True)) if value is not None and band
    ]
    sides = ["above" if value > band.high else "below" if value < band.low else "" for _, value, band in points]
    needed = min(STREAK, len(points))
    for side in ("above", "below"):
        streaks = [k for k in range(len(points) - needed + 1) if all(of == side for of in sides[k : k + needed])]
        if better(name, side):
            last_within = max((k for k, of in enumerate(sides) if of != side), default=-1)
            streaks = [k for k in streaks if k > last_within]
        if streaks and needed:
            first, value, band = points[streaks[0]]
            outside = [(i, v) for (i, v, _), of in zip(points, sides, strict=True) if of == side]
            ratios = [v / usual for i, v in outside if (usual := expected.usual(name, i))]
            return Finding(
                stage, name, side, expected.steps[first], value, band, median(ratios) if ratios else math.nan
            )
    return None


def better(name: str, side: str) -> bool:
    return (side == "below" and name.startswith("loss")) or (side == "above" and name.endswith("accuracy"))


def not_finite(curves: Curves) -> str:
    """Where a loss was not finite first; "" if nowhere."""
    for stage, of in curves.items():
        for name, values in of.items():
            if bad := [step for step, value in values.items() if value is None and name.startswith("loss")]:
                return f"{name} is not finite at step {min(bad)} of stage {stage}"
    return ""


# ---- what usually causes it ----


def tasks_of(recipe: Recipe, kind: set[str]) -> set[tuple[str, str]]:
    """(stage, name of its loss) of tasks that read images alone, texts alone, or both."""
    return {
        (stage.name, f"loss/{task}")
        for stage in recipe.stages
        for task in stage.tasks
        if recipe.family.tasks[task].modalities == kind
    }


def likely(found: Compared, recipe: Recipe, differing: Sequence[str], problem: str) -> str:
    """What usually causes what is outside, in a sentence or two."""
    if problem:
        return f"{problem}: the learning rate, or the range of half precision; the skipped steps and grad_norm before it say which"
    rate = next((f for f in found.outside if f.metric == RATE), None)
    if rate:
        names = [line for line in differing if line.startswith(f"stages.{rate.stage}.")]
        return (
            f"the learning rate: in stage {rate.stage} it is {rate.ratio:.3g} times the reference's"
            + (f" ({names[0]})" if names else "")
            + ", and what comes after follows from it"
        )
    first = found.outside[0].stage if found.outside else ""
    names = [line for line in differing if line.startswith(("model.", f"stages.{first}."))]
    if names:
        return f"settings that differ: {'; '.join(names[:3])}; if not these, {by_what_is_read(found, recipe)}"
    return by_what_is_read(found, recipe)


def by_what_is_read(found: Compared, recipe: Recipe) -> str:
    """The cause by which losses are outside: those of what reads images alone, texts alone, or both."""
    outside = {(f.stage, f.metric) for f in found.outside if f.metric.startswith("loss/")}
    images, texts, pairs = (tasks_of(recipe, kind) for kind in ({"image"}, {"text"}, {"image", "text"}))
    compared = outside | found.inside
    if outside & images and outside & texts:
        return "what all stages share: optimizer, batch size, initial weights or precision"
    if outside & images:
        return (
            "the images: what reads images alone is outside"
            + (", texts alone are inside" if compared & texts else "")
            + ". Are they "
            "all alike, noise, or in another transform or normalisation than the reference's? `vlmo inspect SHARDS` shows them"
        )
    if outside & texts:
        return (
            "the texts: what reads texts alone is outside"
            + (", images alone are inside" if compared & images else "")
            + ". Another "
            "tokenizer or language, captions that repeat or are cut? `vlmo doctor` counts these"
        )
    if outside & pairs and all(f.side == "below" for f in found.outside if (f.stage, f.metric) in pairs):
        return (
            "pairs are easier than the reference's: captions that many images share, fewer candidates (global_batch_size), images of few "
            "kinds"
        )
    if outside & pairs:
        alone = compared & (images | texts)
        return (
            "the pairing: what reads an image and its text together is outside"
            + (", what reads one of them is inside" if alone else "")
            + ". Are captions those of other images (shuffled labels, a table joined by the wrong key), or these images noise? `vlmo inspect "
            "SHARDS` shows them side by side. Else the hand-over of weights (`init`)"
        )
    return "nothing that is known: no loss is outside; look at what is, and at the versions"


# ---- what is told ----


def told(found: Compared, recipe: Recipe, reference: Reference, differing: Sequence[str], problem: str) -> str:
    lines = []
    for stage, expected in reference.stages.items():
        points = found.points.get(stage, 0)
        findings = sorted((f for f in found.outside if f.stage == stage), key=lambda f: f.step)
        state = "outside" if findings else "inside" if points else "not there yet"
        lines.append(f"{stage:12s} {state:8s}  {points} of {len(expected.steps)} stretches of steps")
        for f in findings[:SHOWN]:
            lines.append(
                f"{'':12s}   {f.metric} {f.side} since step {f.step}: {f.value:.4g}, {f.band.low:.4g} to {f.band.high:.4g} is usual"
            )
        if len(findings) > SHOWN:
            lines.append(f"{'':12s}   and {len(findings) - SHOWN} more")
    if extra := [stage.name for stage in recipe.stages if stage.name not in reference.stages]:
        lines.append(f"not compared: {', '.join(extra)}, which the reference has not")
    lines += [f"differs: {line}" for line in differing[:SHOWN]]
    if len(differing) > SHOWN:
        lines.append(f"and {len(differing) - SHOWN} more settings differ")
    if found.outside or problem:
        lines.append(f"usual cause: {likely(found, recipe, differing, problem)}")
    return "\n".join(lines)


def page(run: Path, curves: Curves, reference: Reference, text: str) -> str:
    """HTML with a figure for each metric: the band, and the run in it."""
    figures = []
    for stage, expected in reference.stages.items():
        for name in expected.metrics:
            pairs = zip(expected.steps, expected.band(name), strict=True)
            band = [(step, b.low, b.high) for step, b in pairs if b is not None]
            values = means(curves.get(stage, {}).get(name, {}), expected.steps)
            own = [(step, v) for step, v in zip(expected.steps, values, strict=True) if v is not None]
            if any(value for _, value in own) or any(high for _, _, high in band):  # not what is 0 everywhere
                figures.append(curve(f"{stage}: {name}", {run.name: own}, band=band))
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(str(run))}</title><style>{STYLE}</style><h1>{html.escape(str(run))}</h1>"
        f"<p class=note>The band is what {len(reference.runs)} run(s) of the reference had, and a margin.</p>"
        f"<pre>{html.escape(text)}</pre><div class=curves>{''.join(figures)}</div>"
    )


def chosen(paths: Sequence[Path], recipe: Recipe) -> tuple[Reference, str]:
    """The reference, and what it is in words."""
    if not paths:
        reference, path = shipped_reference(recipe)
        return reference, f"{len(reference.runs)} runs recorded in {path}"
    if len(paths) == 1 and paths[0].suffix == ".json":
        reference = read_reference(paths[0])
        return reference, f"{len(reference.runs)} runs recorded in {paths[0]}"
    return recorded(paths), ", ".join(map(str, paths))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vlmo compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory; it may still be training")
    parser.add_argument(
        "reference", type=Path, nargs="*", metavar="REFERENCE", help="runs, or a file of recorded curves"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also draw the curves in their bands into this HTML file"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="record the curves of RUN and all REFERENCE runs into this file instead",
    )
    args = parser.parse_args(argv)
    try:
        if args.record:
            reference = recorded([args.run, *args.reference])
            write_reference(args.record, reference)
            print(f"{args.record}: the curves of {len(reference.runs)} runs")
            return 0
        recipe, curves = recipe_of(args.run), read_curves(args.run)
        reference, name = chosen(args.reference, recipe)
        differing = differences(recipe, parse_recipe(reference.recipe, f"of {name}"))
        found = compare(curves, reference)
        problem = not_finite(curves)
        text = told(found, recipe, reference, differing, problem)
        outside = bool(found.outside or problem)
        print(
            f"{args.run} beside {name}: {'outside' if outside else 'inside' if any(found.points.values()) else 'too short to say'}"
        )
        print(text)
        if args.page:
            write_atomically(args.page, page(args.run, curves, reference, text).encode())
            print(f"curves in their bands: {args.page}")
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(outside)


if __name__ == "__main__":
    sys.exit(main())
