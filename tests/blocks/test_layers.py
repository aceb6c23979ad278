import pytest
import torch
import torch.nn.functional as F

from vlmo_ds.blocks.layers import GeluLinear


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
