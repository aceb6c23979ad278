"""train_ds.py under ZeRO-3, with the weights counted that the forward pass of a training step gathers."""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from collections import Counter
from pathlib import Path

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

# A weight is given back as soon as the module that needs it is done, and gathered again where it is needed once more.
GATHERED_ALWAYS = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


def run(folder: str, model: str, arguments: list[str]) -> None:
    """Writes gathers.json: parameter -> its gathers in the last step. model: the class, as "package.module:Class"."""
    from vlmo_ds.training import run

    counts: Counter[int] = Counter()
    gather = "_PartitionedParameterCoordinator__all_gather_params"
    gathered, family_model = getattr(Coordinator, gather), pkgutil.resolve_name(model)
    step = family_model.step

    def counted(self, params, forward):
        if forward:
            counts.update(p.ds_id for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gathered(self, params, forward)

    def watched(self, batch):
        counts.clear()
        out = step(self, batch)
        if os.environ["RANK"] == "0":
            found = {name: counts[p.ds_id] for name, p in self.named_parameters() if counts[p.ds_id]}
            Path(folder, "gathers.json").write_text(json.dumps(found))
        return out

    setattr(Coordinator, gather, counted)
    family_model.step = watched
    sys.exit(run.main(arguments))


def command(folder: Path, model: str, arguments: list[str]) -> list[str]:
    """Of start_ranks and run_ranks; arguments: those of train_ds.py."""
    return ["-c", f"from training.gathers import run; run({str(folder)!r}, {model!r}, {arguments!r})"]
