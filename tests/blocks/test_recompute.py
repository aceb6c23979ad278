import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.blocks.vit import Block as ImageBlock
from vlmo_ds.families.coca.block import Block as CLIPBlock

BLOCKS = {"blip": lambda: ImageBlock(8, 2, 0.0), "coca": lambda: CLIPBlock(8, 2, 2.0)}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("cheap", [True, False])
def test_outputs_of_norms_are_not_kept_where_they_are_cheap(family, cheap):
    outputs = []

    def norm(x, weight, bias, eps):
        out = torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
        outputs.append(StorageWeakRef(out.untyped_storage()))
        return out

    torch.manual_seed(0)
    block = BLOCKS[family]()
    if family == "coca":
        block.reset_parameters(1)
    block.double()
    for module in block.modules():
        if isinstance(module, LayerNorm):
            module.kernel = norm
    Recomputed(cheap=cheap).tell(block)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    out = block(x)
    assert [output.expired() for output in outputs] == [cheap] * 2
    out.sum().backward()
    assert len(outputs) == (4 if cheap else 2)  # once more for the backward pass


@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_that_is_computed_again_keeps_its_input_alone(family):
    kept = []

    def norm(x, weight, bias, eps):
        kept.append(StorageWeakRef(x.untyped_storage()))
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    block = BLOCKS[family]().double()
    for module in block.modules():
        if isinstance(module, LayerNorm):
            module.kernel = norm
    recomputed = Recomputed(every=1)
    recomputed.tell(block)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    out = recomputed(block, 0, x)
    assert [one.expired() for one in kept] == [False, True]  # x is ours
    out.sum().backward()
    assert x.grad is not None
