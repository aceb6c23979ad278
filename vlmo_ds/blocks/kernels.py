"""Layer norms by PyTorch, or by NVIDIA Apex where it is installed (the setting model.kernels)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # x, weight, bias, epsilon


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def apex_norm() -> Norm:
    """Apex's fused layer norm, forward and backward. ValueError, with what is missing, where it is not there."""
    if not torch.cuda.is_available():
        raise ValueError("NVIDIA Apex computes on GPUs, and there is none")
    if find_spec("apex") is None:
        raise ValueError("NVIDIA Apex is not installed")
    try:
        fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    except (ImportError, AttributeError):
        raise ValueError(
            "the package apex that is installed is not NVIDIA's, or an old one without its fused layer norm (that of the Python "
            "index is something else entirely: pip uninstall apex)"
        ) from None
    try:
        importlib.import_module("fused_layer_norm_cuda")
    except ImportError as error:
        raise ValueError(
            f"NVIDIA Apex has no CUDA extensions, or they are for another PyTorch: {error} (build it anew with APEX_CUDA_EXT=1)"
        ) from None

    def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if not on_gpu(x) or not x.numel():  # Apex's kernels are not for these
            return torch_norm(x, weight, bias, eps)
        return fused(x, weight, bias, weight.shape, eps)

    return norm


def chosen_norm(setting: str) -> Norm:
    """What a setting (torch, apex, auto: Apex on a GPU where it is installed) means here. ValueError where Apex is asked for and cannot be
    used."""
    if setting == "torch":
        return torch_norm
    try:
        return apex_norm()
    except ValueError as error:
        if setting == "auto":
            return torch_norm
        raise ValueError(f"kernels is apex: {error}; accepted: torch, auto, and apex where NVIDIA's is built") from None


class LayerNorm(nn.LayerNorm):
    """torch's, with a kernel that can be chosen, and which can give copies of its parameters: under ZeRO-3 they are there in its own forward
    alone."""

    kernel: Norm = staticmethod(torch_norm)

    def forward(self, x: Tensor, copies: bool = False) -> Any:
        """norm(x), with copies (norm(x), weight, bias)."""
        normed = self.kernel(x, self.weight, self.bias, self.eps)
        return (normed, self.weight.detach().clone(), self.bias.detach().clone()) if copies else normed


def use_kernels(model: nn.Module, setting: str) -> None:
    """Gives all norms of a model the kernel that the setting means. ValueError as chosen_norm."""
    norm = chosen_norm(setting)
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.kernel = norm
