"""Silent corruption of data, noticed (check_bits): a computation that is repeated has to give the same bits, and so has what several ranks
hold a copy of.

Six of the 419 unexpected interruptions in 54 days of training Llama 3 were of this kind (arXiv:2407.21783, table 5).
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from vlmo_ds.blocks.kernels import use_kernels
from vlmo_ds.config import RecipeError, StageConfig
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed import heartbeat
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.training import post_mortem
from vlmo_ds.training.engine import device
from vlmo_ds.training.scores import as_if_nothing_had_been
from vlmo_ds.training.state import Layout, PartitionedLayout, layout_of, loss_scaler

if TYPE_CHECKING:
    from vlmo_ds.training.loop import Pass, Run

BLOCK = 1 << 22  # elements whose checksum is taken at a time
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element in bytes
FILE = "bits.json"  # what post_mortem/ has of it
SHOWN = 20  # names there, of each rank
UNSURE = "does not have a deterministic implementation"  # PyTorch's words


class WrongBits(Exception):
    """A machine computes or keeps something wrongly; the same on every rank."""


def checksum(value: Tensor) -> Tensor:
    """0-d int64 of a tensor's bits. The sum of each element, as a whole number, times an odd number of its own, modulo 2**64: a change
    of one element always changes it, and the order of summing never does."""
    words = value.detach().reshape(-1).view(WORDS[value.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for start in range(0, len(words), BLOCK):
        part = words[start : start + BLOCK].long()
        total += (part * (2 * torch.arange(start, start + len(part), device=value.device) + 1)).sum()
    return total


class Bits:
    """The checks of a stage. Every rank calls the same in the same order; WrongBits, on all of them, for what is found."""

    def __init__(self, run: Run, stage: StageConfig, engine: deepspeed.DeepSpeedEngine):
        refuse(engine)
        self.run, self.stage, self.engine = run, stage, engine
        self.collector, self.every = run.collector, run.recipe.check_bits
        self.compared = -1  # after so many steps the ranks were last found alike
        self.told = False

    def is_due(self, step: int) -> bool:
        """After so many steps of the stage."""
        return step % self.every == 0

    def compare(self, step: int) -> None:
        """Whether what every rank has whole is the same everywhere, after so many steps."""
        if step == self.compared:
            return
        named = [(name, checksum(value).to(device())) for name, value in self.alike()]
        every_WN = self.collector.gather(torch.stack([value for _, value in named])[None])
        columns = (every_WN != every_WN[:1]).any(0).nonzero().flatten().tolist()
        if not columns:
            self.compared = step
            return
        odd = minority([every_WN[:, column].tolist() for column in columns])
        names = [named[column][0] for column in columns]
        facts = {"sums": {named[column][0]: hex(int(named[column][1])) for column in columns[:SHOWN]}}
        self.stop(step, odd, f"the ranks have different bits in {brief(names)}: it differs on {{who}}", facts)

    def repeat(self, step: int, one: Pass) -> None:
        """Whether a forward and backward pass of a micro-batch gives the same bits twice, after so many steps."""
        heartbeat.beat(f"step {step} of {self.stage.name}: repeated")
        with as_if_nothing_had_been(), deterministic() as unsure:
            model = self.plain_model() if self.engine.zero_optimization_stage() == 3 else self.engine.module
            names, first = self.passed(model, one)
            _, second = self.passed(model, one)
            differing = (first != second).nonzero().flatten().tolist()
        if unsure and not self.told:
            self.told = True
            if self.collector.rank == 0:
                print(
                    f"warning: {self.stage.name}: check_bits: {', '.join(sorted(unsure))} may give other bits each time on this device: "
                    "passes that are repeated are not judged, and only what the ranks hold is compared",
                    file=sys.stderr,
                    flush=True,
                )
        places = self.collector.gather(torch.tensor([differing[0] if differing else len(names)], device=device()))
        if not bool((places < len(names)).any()) or any(self.collector.each_rank(bool(unsure))):
            return
        # An error spreads with what is exchanged: those are at fault who had it first.
        odd = (places == places.min()).nonzero().flatten().tolist()
        facts = {"differing": [names[place] for place in differing[:SHOWN]], "of": len(differing)}
        facts["sample_id"] = one.batch["sample_id"].tolist()
        what = names[int(places.min())]
        self.stop(
            step, odd, f"the same micro-batch, computed twice, has given different bits in {what} on {{who}}", facts
        )

    def passed(self, model: FamilyModel, one: Pass) -> tuple[list[str], Tensor]:
        """(names, checksums [N] int64) of what one pass of a micro-batch gives, in the order in which it comes about; gradients go nowhere."""
        sent: list[Tensor] = []
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        torch.manual_seed(one.seed)
        self.collector.hears = lambda value: sent.append(checksum(value))
        try:
            loss = model.forward(one.batch).loss  # past the engine's hooks, which count passes
        finally:
            self.collector.hears = None
        scale = getattr(loss_scaler(self.engine), "cur_scale", 1)  # of fp16, whose small gradients would be 0
        gradients = torch.autograd.grad(loss * scale, list(trained.values()), allow_unused=True)
        found = {f"what it sends in its forward pass (part {number})": value for number, value in enumerate(sent)}
        found["the loss"] = checksum(loss)
        # the last layers' gradients come first
        for name, gradient in reversed(list(zip(trained, gradients, strict=True))):
            if gradient is not None:
                found[f"the gradient of {name}"] = checksum(gradient)
        return list(found), torch.stack([value.to(device()) for value in found.values()])

    def alike(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank has whole, and has to have alike: under ZeRO-3 weights as they are gathered, under ZeRO-0 the moments too."""
        layout = layout_of(self.engine)
        for name, parameter in self.engine.module.named_parameters():
            yield name, whole(layout, parameter)
        yield from self.engine.module.named_buffers()
        if self.engine.zero_optimization_stage() == 0:
            for name, parameter in layout.parameters.items():
                for kind in ("weight", *layout.moments(parameter)):
                    yield f"{name} (the optimiser's {kind})", layout.whole(parameter, kind)

    def plain_model(self) -> FamilyModel:
        """The engine's model with whole weights, and none of its hooks."""
        recipe, layout = self.run.recipe, layout_of(self.engine)
        model = recipe.family.build(recipe.model_of(self.stage), self.stage.weights, self.collector)
        use_kernels(model, recipe.model.kernels)
        parts, buffers = dict(self.engine.module.named_parameters()), dict(self.engine.module.named_buffers())
        for name, own in model.named_parameters():
            own.data = whole(layout, parts[name]).detach().clone().view(own.shape)
            own.requires_grad_(parts[name].requires_grad)
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].detach().clone()
        return model.train()

    def stop(self, step: int, odd: Sequence[int], what: str, facts: Mapping[str, Any]) -> None:
        """Leaves the evidence and raises. odd: the ranks at fault; what: with the place {who} for them."""
        every = self.collector.each_rank({"host": socket.gethostname(), "device": device_name(), **facts})
        folder = self.run.folder / post_mortem.FOLDER
        who = brief([f"rank {rank} on {every[rank]['host']} ({every[rank]['device']})" for rank in odd])
        hosts = sorted({every[rank]["host"] for rank in odd})
        one = "one of the machines" if len(hosts) > 1 else "the machine"
        message = (
            f"{self.stage.name}, step {step}: {what.format(who=who)}: {one} computes wrongly; take it out ({brief(hosts)}), and the same "
            f"command goes on from the last checkpoint (evidence: {folder})"
        )
        if self.collector.rank == 0:
            evidence = {"cause": message, "stage": self.stage.name, "step": step, "at_fault": odd, "ranks": every}
            if self.collector.world_size == 1:
                post_mortem.prepare(folder)  # with more the watch over ranks has
            with contextlib.suppress(OSError):
                write_atomically(folder / post_mortem.CAUSE, (message + "\n").encode())
                write_atomically(folder / FILE, json.dumps(evidence, indent=1).encode())
        raise WrongBits(message)


def whole(layout: Layout, parameter: nn.Parameter) -> Tensor:
    """All of what this rank computes with, in the engine's dtype (every rank has to call)."""
    if isinstance(layout, PartitionedLayout) and parameter.ds_status != ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
        return layout.gathered(parameter, layout.live(parameter)[1])
    return parameter.detach()


def refuse(engine: deepspeed.DeepSpeedEngine) -> None:
    """RecipeError for settings of the DeepSpeed config under which weights cannot be looked at."""
    zero = engine.config.get("zero_optimization", {})
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise RecipeError(
            "check_bits needs weights in memory, and the DeepSpeed config has zero_optimization.offload_param.device = 'nvme': accepted "
            "are 'cpu' and 'none', or check_bits 0"
        )
    if zero.get("zero_quantized_nontrainable_weights"):
        raise RecipeError(
            "check_bits needs whole weights, and the DeepSpeed config has zero_optimization.zero_quantized_nontrainable_weights = true: "
            "take it out, or set check_bits to 0"
        )


@contextlib.contextmanager
def deterministic() -> Iterator[set[str]]:
    """PyTorch's deterministic algorithms in the context; gives the operations that have none, once it has ended.

    PyTorch warns of cuBLAS as well, whose bits differ only where several streams use it.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    unsure: set[str] = set()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield unsure
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
    unsure |= {str(one.message).split()[0] for one in heard if UNSURE in str(one.message)}


def minority(columns: Sequence[Sequence[int]]) -> list[int]:
    """Ranks whose value in a column is not that of most; all ranks where no value is that of more than half. columns: of each what every rank
    has."""
    odd: set[int] = set()
    for column in columns:
        value, count = Counter(column).most_common(1)[0]
        most = 2 * count > len(column)
        odd |= {rank for rank, one in enumerate(column) if not most or one != value}
    return sorted(odd)


def device_name() -> str:
    return f"{device()}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else str(device())


def brief(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
