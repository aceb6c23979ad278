"""What a family of models is: one value that holds all that the stack asks of it. docs/families.md says how to add one.

The stack never names a family or a task. Data, settings, planning and evaluations ask a Task what it reads and gives.
Nothing here imports PyTorch, so that a recipe is checked in a second; a family's functions import what they need.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pydantic import Field, create_model

from vlmo_ds.config import InitConfig, ModelConfig, Recipe, StageConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.families.step import FamilyModel

Reads = Literal["image", "text", "masked_image", "masked_text", "questions", "answers", "image_pair", "label"]
IMAGES = frozenset({"image", "masked_image", "image_pair", "questions"})  # questions are about an image
# and a sentence about an image pair is a text; "answers" are the questions' as texts, in place of their numbers in a list
TEXTS = frozenset({"text", "masked_text", "image_pair", "questions", "answers"})


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name fits one of the patterns (fnmatch)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Guess(NamedTuple):
    """The loss of a model that guesses, where it is the same for all data, and what to check where training stays there."""

    loss: float
    check: str


# of three pairs one is right: ln 3 - (2 / 3) ln 2
MATCHING = Guess(
    math.log(3) - 2 / 3 * math.log(2),
    "whether the loss of contrast falls (matching learns nothing before that is below about 1), whether texts and images are "
    "paired rightly, and the learning rate",
)


@dataclass(frozen=True)
class Task:
    """What one objective of a family asks of the stack.

    reads: what of a sample becomes its input; gives: the model's calls that it trains (for the evaluations); weight: of its
    loss where a recipe says null; alone: why no other task may be beside it, "" where one may; needs: other task -> why;
    gradient_cache: "features" where its loss is one of contrast over the whole batch, whose features can be cached, "beside"
    where it can go along with such a one; guess: a loss at which nothing has been learnt; stream: the data that it reads where a
    stage has data of several kinds (StageConfig.streams), whose names in a batch begin with it and a slash; "": the stage's `data`.
    """

    reads: frozenset[Reads]
    gives: frozenset[str] = frozenset()
    weight: float = 1.0
    alone: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    gradient_cache: Literal["", "features", "beside"] = ""
    guess: Guess | None = None
    stream: str = ""

    @property
    def modalities(self) -> set[str]:
        """image, text or both."""
        return {name for name, of in (("image", IMAGES), ("text", TEXTS)) if self.reads & of}


class Clamp(NamedTuple):
    """A trained scalar that stays within bounds. It is looked at in steps whose `metric` is not between the two of `near`."""

    name: str
    low: float | None
    high: float | None
    metric: str
    near: tuple[float, float]


class Pixels(NamedTuple):
    """How the model's images are normalised, on pixels from 0 to 1."""

    mean: float | tuple[float, float, float]
    std: float | tuple[float, float, float]


class TokenizerNeeds(NamedTuple):
    """What a family's tokenizer has to have: named special tokens (transformers' names), and the padding id, None: any."""

    special: tuple[str, ...]
    padding: int | None


class Load(NamedTuple):
    """What a rank holds at a time: samples of a forward pass, forward passes of a step, ranks, bytes of a number, whether
    the inputs of recomputed blocks wait in host memory."""

    micro: int
    accumulation: int
    ranks: int
    bytes: int
    offloaded: bool


class Cost(Protocol):
    """What a family's step costs, for `plan`: numbers of one stage. Each is told of in families/vlmo/cost.py."""

    def forward_flops(self, config: Any, stage: StageConfig, samples: float = 1.0) -> float:
        """Multiply-adds times two of a forward pass of so many samples."""
        ...

    def activations(self, config: Any, stage: StageConfig, load: Load) -> dict[str, float]:
        """Bytes on a rank: activations, logits, features, collector."""
        ...

    def collectives(self, config: Any, stage: StageConfig, load: Load) -> dict[str, float]:
        """Bytes that a rank receives in a step by collective, beside weights and gradients."""
        ...

    def walks(self, model: Any, stage: StageConfig) -> dict[str, int]:
        """Parameter -> how often a forward pass enters the module that holds it."""
        ...


class Weights(Protocol):
    """Weights of other origins made those of the family's model."""

    def convert(
        self, source: Mapping[str, Tensor], own: Mapping[str, Tensor], config: Any, init: Any
    ) -> tuple[dict[str, Tensor], list[str]]:
        """(source under the family's names with positions of the model's shapes, what was changed).

        own: the model's state dict. Raises RecipeError where the source's sizes cannot be told.
        """
        ...

    def fresh(self, init: Any) -> list[str]:
        """Patterns of what starts fresh by the family's own settings of `init`."""
        ...

    def finish(self, model: Any, init: Any) -> None:
        """What those settings ask once the weights are in the model."""
        ...

    def official(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A stage's weights as the reference's own files hold them."""
        ...


class HuggingFace(Protocol):
    """The family as transformers' models; importing the module makes them known to the Auto classes."""

    def exported(
        self,
        weights: Mapping[str, Tensor],
        config: Any,
        tasks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        answers: list[str] | None,
        folder: Path,
    ) -> Any:
        """Writes weights of a stage, configuration, tokenizer and processor into a folder; the transformers model."""
        ...


Check = Callable[[dict, "torch.dtype"], Iterable[tuple[str, float, float]]]  # (quantity, relative difference, bar)


def imported(module: str, name: str | None = None) -> Callable[[], Any]:
    """A function that gives a module, or what has a name in it; it is imported then and no sooner."""

    def get() -> Any:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)

    return get


@dataclass(frozen=True)
class Family:
    """A family of models. All patterns are fnmatch patterns of parameter names.

    config, init: the settings of `model` and of a stage's `init`.
    trainable: name -> what a stage with this name trains. no_decay: what weight decay spares. heads: what
    optimizer.head_lr_multiplier is for. words: tensors whose rows are word pieces, the table first. averaged: what moves
    without a gradient (teachers), which is never frozen. clamped: scales that stay within bounds.
    open_clip: settings -> (its configuration of a model with these parameter names, what that cannot say).
    build(config, tasks with weights, collector): the model; cost, weights, huggingface, parity: imported when they are asked for.
    """

    name: str
    config: type[ModelConfig]
    init: type[InitConfig]
    tasks: Mapping[str, Task]
    trainable: Mapping[str, Sequence[str]]
    no_decay: Sequence[str]
    heads: Sequence[str]
    words: Sequence[str]
    clamped: Sequence[Clamp]
    pixels: Pixels
    tokenizer: TokenizerNeeds
    build: Callable[[Any, Mapping[str, float], Collector | None], FamilyModel]
    cost: Callable[[], Cost]
    weights: Callable[[], Weights]
    huggingface: Callable[[], HuggingFace]
    parity: Callable[[], Mapping[str, Check]]  # by the format that a file of recorded numbers names
    averaged: Sequence[str] = ()
    open_clip: Callable[[Any], tuple[dict[str, Any], str]] | None = None

    def giving(self, call: str) -> list[str]:
        """The tasks that train a call of the model."""
        return [name for name, task in self.tasks.items() if call in task.gives]

    @cached_property
    def stage(self) -> type[StageConfig]:
        """The settings of a stage whose model is of this family."""
        about = f"{', '.join(self.trainable)}, or patterns of parameter names"
        made = create_model(
            "StageConfig",
            __base__=StageConfig,
            __doc__=StageConfig.__doc__,
            trainable=(str | list[str], Field("all", description=about)),
            init=(self.init, self.init()),
        )
        made.family = self
        return made

    @cached_property
    def recipe(self) -> type[Recipe]:
        """The settings of a whole run whose model is of this family."""
        made = create_model(
            "Recipe",
            __base__=Recipe,
            __doc__=Recipe.__doc__,
            model=(self.config, self.config()),
            stages=(list[self.stage], Field(min_length=1)),  # type: ignore[name-defined]  # a class made at run time
        )
        made.family = self
        return made
