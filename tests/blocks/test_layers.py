import pytest
import torch
import torch.nn.functional as F

from vlmo_ds.blocks.fold import Fold
from vlmo_ds.blocks.layers import AddRows, GeluLinear, ScaledLinear


def kept_bytes(function, parameters) -> tuple[torch.Tensor, int]:
    """What a function gives, and the bytes that it keeps for the backward pass beyond parameters."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return out, sum(kept.values())


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_gelu_linear_is_gelu_and_a_linear_layer_with_half_the_memory(shape, frozen):
    torch.manual_seed(0)
    layer = GeluLinear(6, 4).double()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    results, memory = [], []
    for way in (layer, lambda x: F.linear(F.gelu(x), layer.weight, layer.bias)):
        before = (
            torch.arange(torch.Size(shape).numel() * 6, dtype=torch.float64).view(*shape, 6).sub(5).requires_grad_()
        )
        x = before * 0.1
        out, kept = kept_bytes(lambda way=way, x=x: way(x), layer.parameters())
        wanted = [before, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
        memory.append(kept)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    one = torch.Size(shape).numel() * 6 * 8
    assert memory[0] == one
    assert memory[1] == (one if "weight" in frozen else 2 * one)


def test_gelu_linear_without_gradients_keeps_nothing():
    layer = GeluLinear(6, 4)
    with torch.no_grad():
        out, kept = kept_bytes(lambda: layer(torch.ones(3, 6)), [])
    assert kept == 0 and not out.requires_grad


@pytest.mark.parametrize("frozen", [(), ("gamma",), ("weight", "bias"), ("weight", "bias", "gamma")])
@pytest.mark.parametrize("kind", [ScaledLinear, GeluLinear])
def test_gamma_is_multiplied_without_keeping_what_it_is_multiplied_with(kind, frozen):
    torch.manual_seed(0)
    layer, gamma = kind(6, 4).double(), torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64).requires_grad_()
    parameters = {"weight": layer.weight, "bias": layer.bias, "gamma": gamma}
    for name in frozen:
        parameters[name].requires_grad_(False)
    results, memory = [], []
    for cheap in (True, False):
        layer.cheap = cheap
        before = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        x = before * 1.5
        out, kept = kept_bytes(lambda x=x: layer(x, gamma), parameters.values())
        wanted = [before, *(p for p in parameters.values() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
        memory.append(kept)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert memory[0] == 5 * 6 * 8
    if not frozen:
        assert memory[1] > memory[0]


def test_rows_are_added_without_keeping_them():
    x, branch = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (5, 2))
    rows = torch.tensor([4, 1])
    out, kept = kept_bytes(lambda: AddRows.apply(x, rows, branch, 2.0), (x, branch))
    assert kept == rows.nbytes
    expected = x.index_add(0, rows, branch, alpha=2.0)
    assert torch.equal(out, expected)
    for found, wanted in zip(*(torch.autograd.grad(y.pow(3).sum(), (x, branch)) for y in (out, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_tokens_are_put_in_their_places_without_keeping_them():
    fold = Fold(torch.tensor([2, 0, 3]), 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    padded, kept = kept_bytes(lambda: fold.padded(x * 1.0), [])
    assert kept == fold.places_N.nbytes
    assert torch.equal(fold.folded(padded), x)
    assert padded.shape == (3, 4, 3) and padded[~fold.valid_BL].eq(0).all()
    torch.testing.assert_close(*torch.autograd.grad(padded.square().sum(), x), 2 * x)
