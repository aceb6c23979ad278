"""The visual tokenizer's recorded numbers: tokens, reconstructions, losses, gradients, and the codebook after each step (vqkd-golden-1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from vlmo_ds.families.comparing import BARS, relative_difference
from vlmo_ds.families.interface import Check
from vlmo_ds.families.vqkd.config import VQKDSettings
from vlmo_ds.families.vqkd.model import VQKD
from vlmo_ds.objectives.quantize import straight_through


def compare(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative difference, bar)."""
    bar, gradient_bar = BARS[dtype]
    settings = {name: value for name, value in golden["config"].items() if name in VQKDSettings.model_fields}
    model = VQKD(VQKDSettings(**settings), {"vqkd": 1.0}).to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in golden["state_dict"].items()})
    images = golden["batch"]["image_01"].to(dtype) * 2 - 1
    for step, (image, teacher) in enumerate(zip(images, golden["batch"]["teacher"].to(dtype), strict=True)):
        recorded, losses = golden["outputs"][f"step{step}"], golden["losses"][f"step{step}"]
        model.zero_grad()
        found = model.encode(image)
        apart, wrong, told = model.losses(found, teacher)
        apart, wrong = apart / found.vector.numel(), wrong / found.token.numel()
        yield f"step{step}.tokens", relative_difference(found.token, recorded["tokens"]), bar
        yield (
            f"step{step}.quantized",
            relative_difference(straight_through(found.vector, found.code), recorded["quantized"]),
            bar,
        )
        yield f"step{step}.reconstruction", relative_difference(told, recorded["reconstruction"]), bar
        yield f"step{step}.losses.commitment", relative_difference(apart, losses["commitment"]), bar
        yield f"step{step}.losses.reconstruction", relative_difference(wrong, losses["reconstruction"]), bar
        total = apart * model.config.commitment + wrong
        yield f"step{step}.losses.total", relative_difference(total, losses["total"]), bar
        total.backward()
        recorded_gradients = golden["grads"][f"step{step}"]
        for name, parameter in model.named_parameters():
            gradient = recorded_gradients.get(name)
            if gradient is not None:
                ours = parameter.grad
                difference = float("inf") if ours is None else relative_difference(ours, gradient)
                yield f"step{step}.grads.{name}", difference, gradient_bar
            elif parameter.grad is not None and bool(parameter.grad.ne(0).any()):
                yield f"step{step}.grads.{name} (recorded: none)", float("inf"), gradient_bar
        model.quantize.follow(*model.quantize.members(found), model.config.decay)
        for name, value in golden["after_step"][step].items():
            yield f"after_step{step}.{name}", relative_difference(model.get_buffer(name), value), bar
    model.eval()
    yield "tokens_eval", relative_difference(model.encode(images[0]).token, golden["outputs"]["tokens_eval"]), bar


FORMATS: Mapping[str, Check] = {"vqkd-golden-1": compare}
