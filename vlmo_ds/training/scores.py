"""What is measured while a stage trains (stages.*.evaluate_every): losses of held-out shards by the stage's own tasks, and the recipe's
evaluations that it can be judged by.

Weights are gathered for it into a plain model, so that training goes on to the bit as if nothing had been measured.
"""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmo_ds.config import RecipeError, StageConfig, nearest
from vlmo_ds.data.loader import Streams, batches
from vlmo_ds.distributed import heartbeat
from vlmo_ds.evaluation.table import Finished, due_in, flat
from vlmo_ds.families.step import FamilyModel, inputs_of
from vlmo_ds.training.engine import device
from vlmo_ds.training.monitor import global_metrics

if TYPE_CHECKING:
    from vlmo_ds.training.loop import Run

HELD_OUT = "held_out"  # what names of held-out losses begin with
SEED = 20_070_913  # of their masks and negatives: the same at every evaluation


class Scores:
    """The evaluations of a stage. best: the best value so far of the metric that is followed, and its step."""

    def __init__(self, run: Run, stage: StageConfig, held_out: Streams | None, trained: FamilyModel):
        """held_out: the data of held_out_of(stage), where that names shards; trained: the model. RecipeError where they make no batch."""
        self.trained = trained
        self.run, self.stage, self.config = run, stage, stage.evaluate
        self.every = stage.evaluate_every
        self.due = due_in(run.recipe, stage)
        self.held_out = held_out
        self.batches = self.whole_batches(held_out) if held_out else 0
        self.best: tuple[float, int] | None = None
        self.since_best = 0  # evaluations
        self.measured_until = -1  # step of the newest that is written down

    def whole_batches(self, held_out: Streams) -> int:
        parts = held_out.parts.values()
        samples = sum(source.total for source in next(iter(parts)).sources)  # all streams have the same
        size = max(part.global_size for part in parts)
        if samples < size:
            raise RecipeError(
                f"stages.{self.stage.name}.evaluate.held_out has {samples} samples, and a batch over all ranks {size}: accepted are "
                f"shards of at least {size}"
            )
        return min(self.config.batches, samples // size)

    def remember(self, records: Iterator[Mapping[str, Any]]) -> None:
        """What earlier starts have measured of the stage, up to the step that this one goes on from (rank 0's); every rank calls."""
        mine = [(record["step"], record.get(self.config.best or "")) for record in records]
        for step, value in self.run.collector.from_rank0(mine):
            self.measured_until = step
            self.compare(step, value)

    def compare(self, step: int, value: float | None) -> bool:
        """Whether the value is the best so far."""
        if self.config.best is None:
            return False
        sign = -1 if self.lower else 1
        if value is not None and math.isfinite(value) and (self.best is None or sign * value > sign * self.best[0]):
            self.best, self.since_best = (value, step), 0
            return True
        self.since_best += 1
        return False

    @property
    def lower(self) -> bool:
        """Whether a lower value is the better one."""
        return "/loss" in (self.config.best or "")

    @property
    def exhausted(self) -> bool:
        """Whether the stage ends here: its best score has not been beaten for as many evaluations as it is given."""
        return bool(self.config.patience) and self.since_best >= self.config.patience

    def is_due(self, step: int) -> bool:
        """After so many steps of the stage; 0: before the first."""
        return step > self.measured_until and (step % self.every == 0 or step == self.stage.steps)

    def take(self, state: Mapping[str, Tensor], step: int) -> tuple[dict[str, float], bool]:
        """Measures weights (rank 0's state dict): (metrics, whether they are the best so far). Every rank calls."""
        started = time.monotonic()
        with as_if_nothing_had_been():
            found = self.measure(self.model_of(state))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name = self.config.best
        if name is not None and name not in found:
            raise RecipeError(
                f"stages.{self.stage.name}.evaluate.best is '{name}', which is not measured{nearest(name, found)}; "
                f"accepted: {', '.join(found)}"
            )
        self.measured_until = step
        better = self.compare(step, found.get(name) if name else None)
        if self.run.collector.rank == 0:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            best = f" (best of {name})" if better else ""
            print(f"{self.stage.name:>8} {step:>6}: {shown}{best}; {time.monotonic() - started:.1f} s", flush=True)
            if self.exhausted and self.best:
                print(
                    f"{self.stage.name}: ends at step {step}: {name} has not been better than at step {self.best[1]} for "
                    f"{self.since_best} evaluations (evaluate.patience)",
                    file=sys.stderr,
                    flush=True,
                )
        return found, better

    def model_of(self, state: Mapping[str, Tensor]) -> FamilyModel:
        """A plain model on every rank's device with rank 0's weights."""
        run = self.run
        heartbeat.beat(f"evaluation: gathering the weights of {self.stage.name}")
        model = run.recipe.family.build(run.recipe.model_of(self.stage), self.stage.weights, run.collector)
        model.open_as(self.trained)
        own = model.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                if run.collector.rank == 0:
                    value.copy_(state[name].view(value.shape))
                run.collector.broadcast(value)
        return model.to(device()).eval()

    @torch.no_grad()
    def measure(self, model: FamilyModel) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.held_out is not None:
            found |= {f"{HELD_OUT}/{name}": value for name, value in self.losses(model, self.held_out).items()}
        run = self.run
        for name, evaluation in self.due.items():
            outcome = evaluation.measure(
                model, Finished(run.recipe, run.folder, run.tokenizer, run.collector), getattr(run.recipe, name)
            )
            found |= flat(outcome.metrics, name)
        return found

    def losses(self, model: FamilyModel, dataset: Streams) -> dict[str, float]:
        """Means over the batches of the losses and of what is counted beside them."""
        outputs = []
        for number, batch in enumerate(batches(dataset, 0, self.batches, 0)):
            heartbeat.beat(f"evaluation: held-out losses of {self.stage.name}")
            torch.manual_seed(SEED + number)
            outputs.append(model(inputs_of(batch, device(), SEED + number, SEED + number)))
        found, _ = global_metrics(outputs, {}, self.run.collector)
        return found


def held_out_of(stage: StageConfig) -> StageConfig:
    """The stage with its held-out shards as data, without augmentation."""
    plain: dict[str, Any] = {"shards": stage.evaluate.held_out, "sources": {}, "index": None, "mixing": "random"}
    plain |= {"transform": "square_transform", "min_scale": None, "flip": True, "length_bucketing": 1}
    plain["visual_tokens"] = None  # which are of other shards: the model's tokenizer makes them
    streams = {
        name: stream.model_copy(update={"data": stream.data.model_copy(update=plain)})
        for name, stream in stage.streams.items()
    }
    return stage.model_copy(update={"data": stage.data.model_copy(update=plain), "streams": streams})


@contextmanager
def as_if_nothing_had_been() -> Iterator[None]:
    """Random numbers go on afterwards where they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)
