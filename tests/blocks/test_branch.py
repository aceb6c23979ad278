"""Compiled feed-forward branches give what the others give."""

import json

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml
from families.beit3.tiny import tiny_batch as beit3_batch
from families.beit3.tiny import tiny_model as beit3
from families.blip.tiny import tiny_batch as blip_batch
from families.blip.tiny import tiny_model as blip
from families.coca.tiny import tiny_batch as coca_batch
from families.coca.tiny import tiny_model as coca
from families.vlmo.tiny import tiny_batch as vlmo_batch
from families.vlmo.tiny import tiny_model as vlmo
from torch._dynamo.utils import counters

from vlmo_ds.blocks import branch

FAMILIES = {
    "vlmo": (vlmo, vlmo_batch),
    "blip": (blip, blip_batch),
    "coca": (coca, coca_batch),
    "beit3": (beit3, beit3_batch),
}


@pytest.fixture(autouse=True)
def anew():
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    branch.compiled_branch.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    branch.compiled_branch.cache_clear()


@pytest.fixture
def traced(monkeypatch):
    """Compiled without the machine code, in a second."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compile_(function, backend="aot_eager", **kw))


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    out = model.train()(batch)
    out.loss.backward()
    return {"": out.loss.detach()} | {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def agree(model, batches) -> None:
    wanted = [gradients(model, batch) for batch in batches]
    branch.compile_branches(model)
    for batch, of in zip(batches, wanted, strict=True):
        torch.testing.assert_close(gradients(model, batch), of, rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"], "nothing was compiled"


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_step_has_the_losses_and_gradients_of_a_plain_one(name, recompute, traced):
    model, batch = FAMILIES[name]
    agree(model(recompute=recompute), [batch()])


def test_machine_code_as_well_and_for_any_number_of_rows():
    """Neither another number of texts or words nor another block is compiled again."""
    sizes = [(5, 16), (4, 16), (3, 24), (6, 16), (7, 24)]
    agree(vlmo(), [vlmo_batch(*size) for size in sizes])
    assert counters["stats"]["unique_graphs"] <= 2


def test_stochastic_depth_draws_the_same(traced):
    agree(vlmo(drop_path_rate=0.5), [vlmo_batch()])


def test_an_evaluation_is_not_compiled(traced):
    model = vlmo().eval()
    branch.compile_branches(model)
    with torch.no_grad():
        model(vlmo_batch())
    assert not counters["stats"]["unique_graphs"]


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("a-compiler-that-is-not-there",))
    with pytest.raises(ValueError, match="needs g\\+\\+, which is not installed; accepted here: none"):
        branch.compile_branches(vlmo())


@pytest.mark.long
@pytest.mark.parametrize("ranks, zero", [(1, 0), (2, 2), (2, 3)])
def test_a_run_with_compiled_branches_has_the_losses_of_one_without(tmp_path, synthetic, ranks, zero):
    found = []
    for compiled in ("none", "blocks"):
        folder = tmp_path / compiled
        folder.mkdir()
        recipe = tiny_recipe(synthetic, retrieval=None)
        recipe["model"]["compile"] = compiled
        file = write_yaml(folder / "recipe.yaml", recipe)
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}))
        options = ["--recipe", file, "--deepspeed_config", folder / "ds.json", "--output_dir", folder / "run"]
        run_ranks(["train_ds.py", *options], ranks, timeout=600)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 9
