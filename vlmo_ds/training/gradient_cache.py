"""A contrastive batch larger than memory, with its exact gradient (GradCache, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmo_ds.families.step import FamilyModel, StepOutput, added


def cached_contrast(
    model: FamilyModel, parts: int, features_of: Callable[[int], dict[str, Tensor]], backward: Callable[[Tensor], None]
) -> StepOutput:
    """The contrastive loss over all parts of a batch together, backpropagated part by part.

    First the features of every part, without what a backward pass needs; then the gradient of the loss by the features;
    then each part again, and this gradient through it. features_of(i) is what the model's contrast_features gives for part i,
    with the same random numbers at every call; backward is called with one scalar for each part, whose gradients add up
    to that of the loss (this rank's, to be averaged over ranks).
    """
    with torch.no_grad():
        found = [features_of(i) for i in range(parts)]
    scales = [name for name in found[0] if name.endswith("_scale")]
    features = [name for name in found[0] if name not in scales]
    sizes = [len(part["image"]) for part in found]
    whole = {name: torch.cat([part[name] for part in found]).requires_grad_() for name in features}
    whole |= {name: found[0][name].clone().requires_grad_() for name in scales}
    del found
    out = StepOutput.empty()
    model.add_contrast(out, whole)
    loss = added(out.losses.values())
    gradient = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    pieces = {name: gradient[name].split(sizes) for name in features}
    for i in range(parts):
        again = features_of(i)
        terms = [(again[name] * pieces[name][i]).sum() for name in features]
        if i == 0:
            terms += [(again[name] * gradient[name]).sum() for name in scales]
        backward(added(terms))
    return out._replace(loss=loss.detach(), losses={name: value.detach() for name, value in out.losses.items()})
