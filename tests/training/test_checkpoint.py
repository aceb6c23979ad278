"""Checkpoints: what was written is the live model, whatever the way of distributing; damage and code are refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, tiny_recipe, write_yaml
from safetensors.torch import load_file

from vlmo_ds.config import RecipeError
from vlmo_ds.manifest import crc32, write_manifest
from vlmo_ds.training import checkpoint
from vlmo_ds.weights_file import read_weights

WORKER = """
import sys, torch
from pathlib import Path
import deepspeed
from families.vlmo.tiny import tiny_batch, tiny_model
from vlmo_ds.recipe_file import load_recipe
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.training import checkpoint
from vlmo_ds.training.ds_config import merge
from vlmo_ds.training.engine import build_engine, start_distributed
from vlmo_ds.training.optim import set_trainable
from vlmo_ds.training.state import fragments, full_state, layout_of
from vlmo_ds.training.weights import frozen_state

folder = Path(sys.argv[1])
start_distributed()
collector = Collector()
stage = load_recipe(folder / "recipe.yaml").stages[1]

def engine_of(zero, half, weights=None):
    model = tiny_model({"textmlm": 1.0}).float()
    model.mlm_score.decoder.weight = model.text_embeddings.word_embeddings.weight  # tied
    if weights:
        model.load_state_dict(weights)
    set_trainable(model, stage)
    frozen = frozen_state(model)
    shapes = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    config = {"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}
    if half:
        config["bf16"] = {"enabled": True}
    engine = build_engine(model, stage, merge(config, stage, collector.world_size))
    return engine, frozen, shapes

def train(engine):
    batch = tiny_batch(4, dtype=torch.float32, seed=collector.rank)
    out = engine({k: v for k, v in batch.items() if k.startswith("text")})
    engine.backward(out.loss)
    engine.step()

def held(engine):
    return {(n, s, k): v.clone() for n, s, kinds in fragments(engine) for k, v in kinds.items()}

for half in (False, True):
    written = {}
    for zero in (0, 1, 2, 3):
        engine, frozen, shapes = engine_of(zero, half)
        train(engine), train(engine)
        where = folder / f"{half}-{zero}"
        writer = checkpoint.CheckpointWriter(where, 1, True, collector)
        assert writer.start(engine, 2, frozen, checkpoint.about_run("text", {}, shapes, engine)) == ""
        assert writer.finish() == (2, "")
        written[zero] = where / "step-00000002"
        live = {}
        every = list(engine.module.named_parameters(remove_duplicate=False))
        with deepspeed.zero.GatheredParameters([p for _, p in every], enabled=zero == 3):
            live = {n: p.detach().clone().cpu().reshape(shapes.get(n, p.shape)) for n, p in every}
        live |= {n: b.cpu() for n, b in engine.module.named_buffers()}
        final = full_state(engine, frozen, shapes)
        if collector.rank == 0:
            torch.save(live, where / "live.pt")
            torch.save(final, where / "final.pt")
            assert checkpoint.main(["consolidate", str(written[zero]), "--output", str(where / "one.safetensors")]) == 0
    for source, path in written.items():  # what one layout wrote, every other takes up, and the next step is the same
        results = {}
        for zero in (0, 1, 2, 3):
            reader = checkpoint.Reader(path)
            engine, frozen, shapes = engine_of(zero, half, reader.weights())
            assert checkpoint.restore(engine, reader) == 2
            layout = layout_of(engine)
            for name, first, kinds in fragments(engine):
                for kind, value in kinds.items():
                    expected = reader.read(kind, name, first, value.numel())
                    assert torch.equal(value.cpu(), expected), (source, zero, kind, name)
            assert engine.global_steps == 2 and layout.steps() == reader.state["optimizer_steps"]
            assert engine.get_lr()[0] == reader.state["learning_rates"][0]
            train(engine)
            results[zero] = full_state(engine, frozen, shapes)
        if collector.rank == 0:
            for zero, state in results.items():
                for name, value in state.items():
                    assert torch.allclose(value, results[0][name], rtol=2e-2 if half else 1e-5, atol=2e-4 if half else 1e-7), (source, zero, name)
print("DONE")
"""


MOVING = """
import dataclasses

import sys, torch
from pathlib import Path
import deepspeed
from families.vlmo.tiny import tiny_batch, tiny_model
from vlmo_ds.recipe_file import load_recipe
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.training import checkpoint
from vlmo_ds.training.ds_config import merge
from vlmo_ds.training.engine import build_engine, start_distributed
from vlmo_ds.training.optim import set_trainable
from vlmo_ds.training.state import Moved, full_state, refuse_moved
from vlmo_ds.training.weights import frozen_state

folder = Path(sys.argv[1])
start_distributed()
collector = Collector()
stage = load_recipe(folder / "recipe.yaml").stages[1]

def engine_of(zero, half, averaged):
    model = tiny_model({"textmlm": 1.0}).float()
    model.family = dataclasses.replace(model.family, averaged=averaged)
    set_trainable(model, stage)
    frozen = frozen_state(model)
    shapes = {n: t.shape for n, t in [*model.named_parameters(), *model.named_buffers()]}
    config = {"zero_optimization": {"stage": zero}, "steps_per_print": 10**9}
    if half:
        config["bf16"] = {"enabled": True}
    engine = build_engine(model, stage, merge(config, stage, collector.world_size))
    return engine, frozen, shapes

def move(engine, name):
    parameter = dict(engine.module.named_parameters())[name]
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=engine.zero_optimization_stage() == 3):
        parameter.add_(0.5)

for zero in (0, 1, 2, 3):
    for half in (False, True):
        for name in ("pooler.dense.weight", "transformer.blocks.1.norm1.bias"):  # cut up, and whole on every rank
            engine, frozen, shapes = engine_of(zero, half, ())
            about = checkpoint.about_run("text", {}, shapes, engine)
            writer = checkpoint.CheckpointWriter(folder / f"{zero}-{half}-{name}", 1, True, collector)
            assert writer.start(engine, 1, frozen, about) == "" and writer.finish() == (1, "")
            move(engine, name)
            try:
                writer.start(engine, 2, frozen, about)
                raise SystemExit(f"ZeRO {zero}: a stale {name} was written")
            except Moved as error:
                assert f"{name} is not trained in this stage, and has changed" in str(error), error
            engine, frozen, shapes = engine_of(zero, half, ("pooler.*", "transformer.blocks.1.norm1.*"))
            before = full_state(engine, frozen, shapes)
            move(engine, name)
            assert writer.start(engine, 3, frozen, about) == "" and writer.finish() == (3, "")
            refuse_moved(engine, frozen, collector)
            after = full_state(engine, frozen, shapes)
            if collector.rank == 0:
                read = checkpoint.Reader(writer.folder / "step-00000003").weights()
                assert read.keys() == after.keys()
                for key, value in after.items():
                    assert torch.equal(read[key], value), key
                    assert torch.equal(value, before[key]) is (key != name), key
print("DONE")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_yaml(folder / "recipe.yaml", tiny_recipe(folder))
    (folder / "worker.py").write_text(WORKER)
    assert "DONE" in run_ranks([str(folder / "worker.py"), str(folder)], 2)
    return folder


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_consolidated_file_equals_the_live_model(written, half, zero):
    """Trained, frozen and tied weights: to the bit in float32, after rounding in bfloat16; and the optimiser's own."""
    folder = written / f"{half}-{zero}"
    found = load_file(folder / "one.safetensors")
    live, final = (torch.load(folder / name, weights_only=True) for name in ("live.pt", "final.pt"))
    assert found.keys() == live.keys() == final.keys() and "mlm_score.decoder.weight" in found
    for name, value in live.items():
        assert found[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        assert torch.equal(found[name].to(value.dtype), value), name
        assert torch.equal(found[name], final[name]), name
    assert torch.equal(found["mlm_score.decoder.weight"], found["text_embeddings.word_embeddings.weight"])


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_loader_runs_pickled_code(tmp_path, written):
    """A pickle that would make a file, given to everything that reads weights or checkpoints."""
    mark = tmp_path / "ran"
    evil = tmp_path / "evil"
    for file in ("model.pt", "model.safetensors", "plain.pt"):
        evil.mkdir(exist_ok=True)
        if file == "plain.pt":
            (evil / file).write_bytes(pickle.dumps({"model": Malicious(mark)}))
        else:
            torch.save({"state_dict": Malicious(mark)}, evil / file)
        with pytest.raises(RecipeError, match="cannot be read as tensors"):
            read_weights(evil / file)
    step = tmp_path / "run" / "step-00000002"
    step.mkdir(parents=True)
    original = written / "False-2" / "step-00000002"
    for name in ("state.json", "manifest.json"):
        (step / name).write_bytes((original / name).read_bytes())
    torch.save(Malicious(mark), step / "rank-00000.safetensors")
    with pytest.raises(RecipeError, match="rank-00000.safetensors"):
        checkpoint.Reader(step)
    (step / "state.json").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(RecipeError, match="state.json"):
        checkpoint.Reader(step)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # it would have
    assert mark.exists()


def test_a_changed_byte_is_found(tmp_path, written, capsys):
    original = written / "False-3" / "step-00000002"
    step = tmp_path / "step-00000002"
    step.mkdir()
    for file in original.iterdir():
        (step / file.name).write_bytes(file.read_bytes())
    assert checkpoint.fault_of(step, (0, 1)) == ""
    data = bytearray((step / "rank-00001.safetensors").read_bytes())
    data[-5] ^= 1
    (step / "rank-00001.safetensors").write_bytes(data)
    assert checkpoint.fault_of(step) == ""  # the size is right
    assert "rank-00001.safetensors does not hold what was written" in checkpoint.fault_of(step, (0, 1))
    assert checkpoint.main(["consolidate", str(step)]) == 2
    assert "does not hold what was written" in capsys.readouterr().err


def test_parts_that_are_missing_are_named(tmp_path, written):
    original = written / "False-2" / "step-00000002"
    step = tmp_path / "step-00000002"
    step.mkdir()
    (step / "state.json").write_bytes((original / "state.json").read_bytes())
    (step / "rank-00000.safetensors").write_bytes((original / "rank-00000.safetensors").read_bytes())
    write_manifest(step, {file.name: crc32(file) for file in step.iterdir()})
    with pytest.raises(RecipeError, match=r"holds \d+ of \d+ elements of weight "):
        checkpoint.Reader(step).weights()
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(RecipeError, match="has format 99, this version reads 1"):
        checkpoint.Reader(step)


def test_consolidate_leaves_no_half_file(tmp_path, written):
    folder = written / "True-2"
    (tmp_path / "taken").mkdir()
    assert checkpoint.main(["consolidate", str(folder), "--output", str(tmp_path / "taken")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_what_moves_without_a_gradient_is_declared_or_an_error(tmp_path):
    """ZeRO 0 to 3, float32 and bfloat16: a frozen parameter that moves is never written as it was; an averaged one is as it is."""
    write_yaml(tmp_path / "recipe.yaml", tiny_recipe(tmp_path))
    (tmp_path / "worker.py").write_text(MOVING)
    assert "DONE" in run_ranks([str(tmp_path / "worker.py"), str(tmp_path)], 2)
