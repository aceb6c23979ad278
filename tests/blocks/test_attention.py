import pytest
import torch
import torch.nn.functional as F

from vlmo_ds.blocks.attention import ATTENTION, Recomputing, attend

MASKS = {
    "none": None,
    "keys": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None],
    "causal": torch.ones(4, 5).tril(1).bool()[None, None],
    "of each sequence": torch.ones(3, 1, 4, 5).bool().tril(2)
    & (torch.arange(5) != torch.tensor([4, 3, 2])[:, None, None, None]),
}


def inputs(dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, length, 2, 8, dtype=torch.float64, generator=g).to(dtype).transpose(1, 2).requires_grad_()
        for length in (4, 5, 5)
    ]


def with_gradients(function, dtype) -> list[torch.Tensor]:
    q, k, v = inputs(dtype)
    out = function(q, k, v)
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(dtype)
    return [out, *torch.autograd.grad(out, (q, k, v), weights)]


@pytest.mark.parametrize("mask", MASKS)
def test_probabilities_computed_again_give_what_torchs_kernel_gives(mask):
    ours = with_gradients(lambda q, k, v: Recomputing.apply(q, k, v, None, MASKS[mask]), torch.float64)
    torchs = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[mask]), torch.float64
    )
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_16_bits_is_near_to_that_in_float64(mask):
    """On a CPU by another computation than torch's kernel."""
    exact = with_gradients(lambda q, k, v: attend(q, k, v, MASKS[mask]), torch.float64)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, MASKS[mask]), torch.bfloat16)
    assert type(ours[0].grad_fn).__name__ == "RecomputingBackward"
    for found, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)


def test_attention_with_dropout_is_torchs():
    out = with_gradients(lambda q, k, v: attend(q, k, v, None, dropout=0.5), torch.bfloat16)[0]
    assert type(out.grad_fn).__name__ != "RecomputingBackward"


@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("bias", [True, False])
def test_a_mask_of_the_first_keys_leaves_the_others_there(kernel, bias):
    first = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    table = torch.arange(40, dtype=torch.float64).view(2, 4, 5).sin() if bias else None
    found, wanted = (
        with_gradients(lambda q, k, v, mask=mask: ATTENTION[kernel](q, k, v, table, mask), torch.float64)
        for mask in (first, F.pad(first, (0, 2), value=True))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], ATTENTION[kernel](*inputs(torch.float64), table, None))
