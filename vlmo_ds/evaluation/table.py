"""What is measured after the last stage: one evaluation for each of the recipe's settings of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import (
    CaptioningConfig,
    EvaluationConfig,
    Recipe,
    RetrievalConfig,
    StageConfig,
    VQAConfig,
    ZeroShotConfig,
)
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import captioning, classification, nlvr2, retrieval, runs, vqa, zero_shot
from vlmo_ds.evaluation.captioning import Captioned
from vlmo_ds.evaluation.retrieval import RetrievalResult, RetrievalSet
from vlmo_ds.families.step import FamilyModel


class Finished(NamedTuple):
    """A run whose last stage is measured."""

    recipe: Recipe
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    collector: Collector


@dataclass(frozen=True)
class Outcome:
    """metrics: for <name>.json; text: for the console; pictures: for the report's gallery, instead of a table of metrics;
    captions: for the report's captions, beside it; files: further ones of the run's folder, by name."""

    metrics: Mapping[str, Any]
    text: str
    pictures: tuple[RetrievalSet, RetrievalResult] | None = None
    captions: Sequence[Captioned] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


class Evaluation(NamedTuple):
    """call: of the model, which the stage has to have trained; read: name and pictures of all that is read, from the settings and
    those of the model; measure: with the same settings; check: that they fit the model's longest text and the tokenizer."""

    call: str
    read: Callable[[Any, Any], Iterator[tuple[str, list[bytes]]]]
    measure: Callable[[FamilyModel, Finished, Any], Outcome]
    check: Callable[[Any, int, PreTrainedTokenizerBase], None] = lambda *_: None


def measure_retrieval(model: FamilyModel, of: Finished, config: RetrievalConfig) -> Outcome:
    data = retrieval.load_set(config, model.config.image_size, model.config.max_text_len, of.tokenizer)
    result = retrieval.evaluate(model, data, config, of.collector)
    text = retrieval.table(result.metrics, len(data.images), len(data.captions))
    return Outcome(result.metrics, text, (data, result))


def measure_vqa(model: FamilyModel, of: Finished, config: VQAConfig) -> Outcome:
    answers = vqa.read_answers(of.folder, of.recipe.model.vqav2_label_size)
    metrics = vqa.overall(vqa.evaluate(model, config, answers, of.tokenizer, of.collector))
    return Outcome(metrics, vqa.table(metrics))


def measure_nlvr2(model: FamilyModel, of: Finished, config: EvaluationConfig) -> Outcome:
    metrics = nlvr2.scores(nlvr2.evaluate(model, config, of.tokenizer, of.collector))
    return Outcome(metrics, nlvr2.table(metrics))


def measure_captioning(model: FamilyModel, of: Finished, config: CaptioningConfig) -> Outcome:
    written = captioning.evaluate(model, config, of.tokenizer, of.collector)
    metrics, how = captioning.overall(written)
    files = {"captions.json": captioning.server_json(written)}
    return Outcome(metrics, captioning.table(metrics, how), captions=written[: config.gallery], files=files)


def measure_zero_shot(model: FamilyModel, of: Finished, config: ZeroShotConfig) -> Outcome:
    metrics = zero_shot.evaluate(model, config, *zero_shot.names_of(config), of.tokenizer, of.collector)
    return Outcome(metrics, classification.table(metrics, "zero-shot"))


def measure_classification(model: FamilyModel, of: Finished, config: EvaluationConfig) -> Outcome:
    metrics = classification.evaluate(model, config, of.collector)
    return Outcome(metrics, classification.table(metrics))


TABLE: dict[str, Evaluation] = {
    "retrieval": Evaluation("encode_text", lambda config, _: retrieval.names_and_pictures(config), measure_retrieval),
    "vqa": Evaluation("answer", lambda config, _: runs.names_and_pictures(config, vqa.read), measure_vqa),
    "nlvr2": Evaluation("compare", lambda config, _: runs.names_and_pictures(config, nlvr2.read), measure_nlvr2),
    "captioning": Evaluation(
        "caption_step",
        lambda config, _: runs.names_and_pictures(config, captioning.read),
        measure_captioning,
        captioning.check,
    ),
    "zero_shot": Evaluation(
        "encode_text",
        lambda config, _: zero_shot.names_and_pictures(config),
        measure_zero_shot,
        zero_shot.check,
    ),
    "classification": Evaluation(
        "classify",
        lambda config, model: classification.names_and_pictures(config, lambda raw: raw.label_below(model.num_classes)),
        measure_classification,
    ),
}


def flat(metrics: Mapping[str, Any], name: str = "") -> dict[str, float]:
    """Numbers of nested tables, by the path to each. name: what all paths begin with."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        path = f"{name}/{key}" if name else key
        if isinstance(value, Mapping):
            found |= flat(value, path)
        elif isinstance(value, (int, float)):
            found[path] = float(value)
    return found


def due(recipe: Recipe) -> dict[str, Evaluation]:
    """Those of the last stage."""
    return due_in(recipe, recipe.stages[-1])


def planned(recipe: Recipe) -> dict[str, Evaluation]:
    """Those of the last stage, and of stages that are measured while they train."""
    found = due(recipe)
    for stage in recipe.stages:
        found |= due_in(recipe, stage) if stage.evaluate_every else {}
    return found


def due_in(recipe: Recipe, stage: StageConfig) -> dict[str, Evaluation]:
    """Those that the recipe has settings for, and whose call the stage trains."""
    return {name: one for name, one in TABLE.items() if getattr(recipe, name) and one.call in stage.gives}
