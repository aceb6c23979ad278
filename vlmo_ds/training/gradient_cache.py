"""A contrastive batch larger than memory, with its exact gradient (GradCache, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmo_ds.families.step import FamilyModel, StepOutput, added


def cached_contrast(
    model: FamilyModel,
    parts: int,
    call: Callable[[int, str, dict[str, Tensor]], Any],
    backward: Callable[[Tensor], None],
) -> StepOutput:
    """The contrastive loss over all parts of a batch together, backpropagated part by part.

    First the features of every part, without what a backward pass needs; then the gradient of the loss by the features;
    then each part again with the losses of the other tasks, and this gradient through it. call(i, name, also) is what a call
    of the model gives for part i and entries beside it, with the same random numbers at every time; backward is called with
    one scalar for each part, whose gradients add up to that of the losses (this rank's, to be averaged over ranks).

    Names of features that end in _scale or _bias are of the whole model, those in _count are counts, which the second pass is given
    summed over the parts; whole numbers have no gradient.
    """
    with torch.no_grad():
        found = [call(i, "contrast_features", {}) for i in range(parts)]
    scales = [name for name in found[0] if name.endswith(("_scale", "_bias"))]
    counts = {name: added(part[name] for part in found) for name in found[0] if name.endswith("_count")}
    by_sample = [name for name in found[0] if name not in scales and name not in counts]
    features = [name for name in by_sample if found[0][name].is_floating_point()]
    sizes = [len(part["image"]) for part in found]
    whole = {name: torch.cat([part[name] for part in found]).requires_grad_() for name in features}
    whole |= {name: found[0][name].clone().requires_grad_() for name in scales}
    keys = {name: torch.cat([part[name] for part in found]) for name in by_sample if name not in features}
    del found
    out = StepOutput.empty()
    model.add_contrast(out, {**whole, **keys})
    loss = added(out.losses.values())
    gradient = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    pieces = {name: gradient[name].split(sizes) for name in features}
    for i in range(parts):
        again, others = call(i, "cached_step", counts)
        terms = [(again[name] * pieces[name][i]).sum() for name in features]
        if i == 0:
            terms += [(again[name] * gradient[name]).sum() for name in scales]
        backward(added([*terms, *others.losses.values()]))
        add_part(out, others)
    loss = added(value.detach() for value in out.losses.values())
    return out._replace(loss=loss, losses={name: value.detach() for name, value in out.losses.items()})


def add_part(out: StepOutput, part: StepOutput) -> None:
    """Adds the losses and counts of a part's other tasks to those of the batch."""
    for mine, theirs in ((out.losses, part.losses), (out.values, part.values)):
        for name, value in theirs.items():
            mine[name] = mine[name] + value.detach() if name in mine else value.detach()
    for name, (numerator, denominator) in part.ratios.items():
        before = out.ratios.get(name)
        out.ratios[name] = (before[0] + numerator, before[1] + denominator) if before else (numerator, denominator)
