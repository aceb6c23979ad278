"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of a mixture of gradient and momentum, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """params: groups; betas: of the update and of the momentum. One float32 state a parameter, exp_avg, in place of AdamW's two."""

    moments = ("exp_avg",)

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's has overloads
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            gradients = [parameter.grad for parameter in trained]
            for parameter in trained:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            momenta = [self.state[parameter]["exp_avg"] for parameter in trained]
            gradients = [gradient.float() for gradient in gradients]
            updates = torch._foreach_lerp(momenta, gradients, 1 - first)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(trained, 1 - lr * group["weight_decay"])
            torch._foreach_add_(trained, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - second)
        return loss
