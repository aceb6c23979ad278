"""Layers of a vision transformer that families share: patch embedding, feed-forward network, stochastic depth.

Dimensions: B sequences, L tokens of one sequence, D width, P patches, N tokens of all sequences together ("packed").
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def given(value: T | None, what: str) -> T:
    """What not every call needs; ValueError where one that needs it goes without."""
    if value is None:
        raise ValueError(f"{what} is needed here, and is None")
    return value


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(feature: Tensor) -> Tensor:
    """[B, E] of unit length, in float32 at least."""
    return F.normalize(wide(feature), dim=-1)


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each (ViT, arXiv:2010.11929, section 3.1)."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int):
        super().__init__()
        self.image_size = image_size
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, image_size, image_size] -> [B, P, D]."""
        if image_BCHW.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(str(n) for n in image_BCHW.shape[-2:])
            raise ValueError(f"image is {found} pixels, the model takes {self.image_size}x{self.image_size}")
        return self.proj(image_BCHW).flatten(2).transpose(1, 2)


class EndOfBranch(torch.autograd.Function):
    """gamma * F.linear(F.gelu(x), weight, bias), without GELU where `gelu` is false and without gamma where it is None. Keeps x for the
    backward pass, and neither what GELU makes of it nor the product that gamma's gradient is of: that comes from the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        ctx.gelu = gelu
        out = F.linear(F.gelu(x) if gelu else x, weight, bias)
        return out if gamma is None else out.mul_(gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma = ctx.saved_tensors
        of_x, of_weight, of_bias, of_gamma, _ = ctx.needs_input_grad
        scaled = grad if gamma is None else grad * gamma
        found: dict[str, Tensor | None] = dict.fromkeys(("x", "weight", "bias", "gamma"))
        if of_x:
            found["x"] = torch.ops.aten.gelu_backward(scaled @ weight, x) if ctx.gelu else scaled @ weight
        if of_bias:
            found["bias"] = scaled.flatten(0, -2).sum(0)
        if of_weight or of_gamma:
            rows = grad.flatten(0, -2)
            product = rows.t() @ (F.gelu(x) if ctx.gelu else x).flatten(0, -2)
            if of_gamma:
                found["gamma"] = torch.linalg.vecdot(weight, product) + bias * rows.sum(0)
            if of_weight:
                found["weight"] = product if gamma is None else product.mul_(gamma[:, None])
        return *found.values(), None


class ScaledLinear(nn.Linear):
    """A linear layer at the end of a residual branch, whose output is multiplied with LayerScale's gamma (CaiT, arXiv:2103.17239)."""

    cheap = True  # what can be computed again is not kept for the backward pass
    gelu = False

    def forward(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        if self.cheap and (self.gelu or gamma is not None):
            return EndOfBranch.apply(x, self.weight, self.bias, gamma, self.gelu)
        out = F.linear(F.gelu(x) if self.gelu else x, self.weight, self.bias)
        return out if gamma is None else gamma * out


class GeluLinear(ScaledLinear):
    """GELU before it: the second half of a feed-forward network."""

    gelu = True


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = GeluLinear(hidden_dim, dim)

    def forward(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """gamma: LayerScale's, of the output."""
        return self.fc2(self.fc1(x), gamma)


def kept(sequences: int, rate: float) -> Tensor:
    """bool [sequences] on the CPU: those whose residual branch stochastic depth (arXiv:1603.09382) does not leave out."""
    return torch.rand(sequences, device="cpu") >= rate


def drop_path(branch_ND: Tensor, rate: float, keep_N: Tensor) -> Tensor:
    """A residual branch with zeros where it is left out, and scaled up elsewhere. keep_N: for each row what `kept` says of its sequence."""
    return branch_ND * (keep_N.to(branch_ND.dtype) / (1.0 - rate))[:, None]


class AddRows(torch.autograd.Function):
    """x [N, ...] with scale * branch [K, ...] added to K of its rows, each named once. torch's index_add keeps the branch for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_K: Tensor, branch: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.scale = scale
        return x.index_add(0, rows_K, branch, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows_K,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, rows_K).mul_(ctx.scale), None


def init_weights(module: nn.Module, std: float) -> None:
    """Truncated normal for linear layers and embeddings, zeros for biases and the padding word."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


Channels = float | tuple[float, float, float]


def normalize(image: Tensor, mean: Channels, std: Channels, dtype: torch.dtype) -> Tensor:
    """uint8 pixels [..., 3, H, W], put between 0 and 1, less their mean and over their std (of all channels, or of each); a
    floating-point image is normalised already."""
    if image.dtype == torch.uint8:
        mean_311, std_311 = (torch.as_tensor(value, device=image.device).view(-1, 1, 1) for value in (mean, std))
        image = (image.float() / 255 - mean_311) / std_311
    return image.to(dtype)
