"""What the model of every family is to the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.config import ModelConfig
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.interface import Family

Batch = Mapping[str, Tensor]


def inputs_of(batch: Mapping[str, Any], device: torch.device, negative_seed: int, step_seed: int) -> dict[str, Tensor]:
    """A loader's batch as a model takes it: its tensors on a device, and by what hard negatives, and what is the same for all of a step, are
    drawn."""
    tensors = {name: value.to(device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)}
    return {**tensors, "negative_seed": torch.tensor(negative_seed), "step_seed": torch.tensor(step_seed)}


class StepOutput(NamedTuple):
    """What one forward pass gives back (a tuple, in which DeepSpeed finds the tensors).

    loss: this rank's weighted sum, to be averaged over ranks; losses: the same per task, weights included, gradients
    attached; ratios: (numerator, denominator) of this rank, to be summed over ranks; values: to be averaged over ranks, among
    them loss/<task> without its weight; seen: what the model's `settle` is given once the optimiser's step is over.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    ratios: dict[str, tuple[Tensor, Tensor]]
    values: dict[str, Tensor]
    seen: dict[str, Tensor]

    @classmethod
    def empty(cls) -> StepOutput:
        return cls(torch.zeros(()), {}, {}, {}, {})


def added(values: Iterable[Tensor]) -> Tensor:
    """The sum, in order. Python's own begins with a whole number, and of nothing is one."""
    return reduce(add, values)


class FamilyModel(nn.Module):
    """What training, planning and the evaluations need of a model; how it computes is its family's matter.

    Everything goes through forward, because under ZeRO-3 parameters that a module holds itself are there only inside it.
    """

    family: ClassVar[Family]
    config: ModelConfig
    tasks: dict[str, float]  # name -> weight of its loss
    collector: Collector

    def __init__(self, config: ModelConfig, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__()
        self.config = config
        self.tasks = dict(tasks)
        self.collector = collector or Collector()
        self.recomputed = Recomputed(config.recompute != "none", config.recompute_every)  # of all its stacks

    def forward(self, batch: Batch, call: str = "step") -> Any:
        """One of the model's calls. Every family has step (all tasks, gives StepOutput); with tasks whose features are
        cached contrast_features and cached_step; and for the evaluations the calls that its tasks give."""
        raise NotImplementedError

    def add_contrast(self, out: StepOutput, found: Mapping[str, Tensor]) -> Any:
        """Records the losses over all of a batch's features, as contrast_features gave them; reads no parameter."""
        raise NotImplementedError

    @property
    def unwritten(self) -> list[int]:
        """Words of the model's own that no text holds: they are never written."""
        return []

    def followed(self) -> Mapping[str, str]:
        """Parameter that moves without a gradient -> the trained one that it is an average of (a teacher's, its student's)."""
        return {}

    @property
    def momentum(self) -> float:
        """What of such an average stays in a step."""
        raise NotImplementedError

    def open(self) -> None:
        """Opens what training reads and is no part of the model. RecipeError where it cannot be used."""

    def open_as(self, other: Any) -> None:
        """Takes what another model of this kind has opened."""

    def outside(self) -> dict[str, str]:
        """Checksums of what has been opened, by the setting that names it: a run goes on with the same. None of what has no checksum."""
        return {}

    @property
    def looks_ahead(self) -> bool:
        """Whether the call `keys` is to see all micro-batches of a step before `step` sees the first."""
        return False

    def keys_of_step(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Of a model that looks ahead: what `step` is given beside each micro-batch, of what the call `keys` gave for all of them."""
        raise NotImplementedError

    def push(self, keys: Mapping[str, Tensor]) -> None:
        """Of a model that looks ahead: what keys_of_step gave, after a step that was taken."""
        raise NotImplementedError

    def settle(self, seen: Sequence[Mapping[str, Tensor]], taken: bool) -> dict[str, float]:
        """Moves what has no gradient by what `step` has `seen` in each micro-batch, where the optimiser's step was taken; metrics. (Every
        rank has to call.)"""
        return {}

    def idle(self) -> Sequence[str]:
        """Patterns of parameters that none of the model's tasks reaches; they stay as they are."""
        return ()

    def offload_checkpoints(self, offloaded: bool) -> None:
        """Whether the inputs of recomputed blocks wait in host memory."""
        self.recomputed.offload = offloaded

    def contrast_scale(self) -> Tensor:
        """What cosines of image and text features are multiplied with, 0-d float32."""
        raise NotImplementedError

    def gives(self, call: str) -> bool:
        """Whether one of the model's tasks trains this call of it."""
        return any(call in self.family.tasks[task].gives for task in self.tasks)

    def record(self, out: StepOutput, task: str, result: tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]) -> None:
        """Adds a task's loss and counts to what a step gives."""
        loss, ratios = result
        out.losses[task] = loss * self.tasks[task]
        out.values[f"loss/{task}"] = loss.detach()
        out.ratios.update({f"{task}/{name}": ratio for name, ratio in ratios.items()})
