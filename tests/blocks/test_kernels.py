"""Norms by NVIDIA Apex, of which a stand-in has the signatures: there is no GPU here."""

import importlib
import sys

import pytest
import torch
from families.beit3.tiny import tiny_batch as beit3_batch
from families.beit3.tiny import tiny_model as beit3
from families.blip.tiny import tiny_batch as blip_batch
from families.blip.tiny import tiny_model as blip
from families.coca.tiny import tiny_batch as coca_batch
from families.coca.tiny import tiny_model as coca
from families.vlmo.tiny import tiny_batch as vlmo_batch
from families.vlmo.tiny import tiny_model as vlmo

from vlmo_ds.blocks.kernels import LayerNorm, chosen_norm, torch_norm, use_kernels

STAND_IN = """
import torch.nn.functional as F

calls = 0

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    global calls
    calls += 1
    assert input.numel(), "a launch of no blocks is an error of CUDA"
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Writes a package apex of the modules given, name -> text."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("vlmo_ds.blocks.kernels.on_gpu", lambda x: True)

    def write(**modules):
        for name, text in {"apex.__init__": "", **modules}.items():
            path = tmp_path / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def nvidias(write):
    write(**{"apex.normalization.__init__": "", "apex.normalization.fused_layer_norm": STAND_IN})
    write(fused_layer_norm_cuda="")


def vlmo_without_some_experts():
    """Stochastic depth leaves some experts without a row."""
    return vlmo(drop_path_rate=0.9).train()


@pytest.mark.parametrize(
    "model, batch",
    [
        (vlmo, vlmo_batch),
        (vlmo_without_some_experts, vlmo_batch),
        (coca, coca_batch),
        (blip, blip_batch),
        (beit3, beit3_batch),
    ],
)
@pytest.mark.parametrize("setting", ["auto", "apex"])
def test_every_norm_is_apexs_and_nothing_changes(installed, model, batch, setting):
    nvidias(installed)
    results = []
    for kernels in ("torch", setting):
        ours = model()
        use_kernels(ours, kernels)
        torch.manual_seed(0)
        assert not [m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm) and not isinstance(m, LayerNorm)]
        out = ours(batch())
        out.loss.backward()
        results.append([out.loss, *(p.grad for p in ours.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert sys.modules["apex.normalization.fused_layer_norm"].calls > 10


def test_what_is_missing_is_said(installed):
    with pytest.raises(ValueError, match="kernels is apex: NVIDIA Apex is not installed; accepted: torch, auto"):
        chosen_norm("apex")
    installed(**{"apex.__init__": "import pyramid_of_somebody_else"})
    with pytest.raises(ValueError, match="is not NVIDIA's"):
        chosen_norm("apex")
    assert chosen_norm("auto") is torch_norm


def test_what_is_not_built_or_has_no_gpu_is_said(installed, monkeypatch):
    nvidias(installed)
    assert chosen_norm("auto") is not torch_norm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_norm("auto") is torch_norm
    with pytest.raises(ValueError, match="there is none"):
        chosen_norm("apex")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    del sys.modules["fused_layer_norm_cuda"]
    installed(fused_layer_norm_cuda="raise ImportError('undefined symbol: _ZN3c10')")
    with pytest.raises(ValueError, match="they are for another PyTorch: undefined symbol"):
        chosen_norm("apex")
