"""train_ds.py, with the bytes of every collective counted and the memory of tensors measured before each step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from vlmo_ds.distributed.measuring import count_collectives


def tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)


def held(*values) -> int:
    """Bytes of the storages behind all tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(list(values))}.values())


def memory(engine) -> dict[str, int]:
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    if engine.zero_optimization_stage() == 3:
        whole = [p.data for p in parameters if p.ds_persist]
        weights = held([p.ds_tensor for p in parameters], whole)
    else:
        weights = held([p.data for p in parameters])
    parts = getattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    gradients = held([p.grad for p in parameters], getattr(optimizer, "averaged_gradients", {}), parts)
    masters = [
        getattr(optimizer, name, [])
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups")
    ]
    moments = [[state["exp_avg"], state["exp_avg_sq"]] for state in inner.state.values()]
    return {"weights": weights, "gradients": gradients, "optimizer": held(masters, moments)}


def run(folder: str, arguments: list[str]) -> None:
    wire = count_collectives()
    from vlmo_ds.training import loop, run

    rows = []
    build, log = loop.build_engine, loop.Monitor.log

    def built(*args):
        engine = build(*args)
        step = engine.step

        def measured():
            rows.append({"memory": memory(engine)})
            step()

        engine.step = measured
        wire.clear()
        return engine

    def logged(self, *args):
        rows[-1] |= {"stage": self.stage, "wire": dict(wire)}
        log(self, *args)
        wire.clear()

    loop.build_engine, loop.Monitor.log = built, logged
    code = run.main(arguments)
    Path(folder, f"counted-{os.environ['RANK']}.json").write_text(json.dumps(rows))
    sys.exit(code)
