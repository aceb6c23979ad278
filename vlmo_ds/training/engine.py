"""The process group and the DeepSpeed engine of a stage."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from vlmo_ds.config import StageConfig
from vlmo_ds.distributed import clock
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.training.ds_config import is_half
from vlmo_ds.training.host import prepare_cpu
from vlmo_ds.training.optim import build_optimizer, learning_rate, parameter_groups, place_matrices
from vlmo_ds.training.state import layout_of, set_weights


def agreed_name(store: dist.Store, rank: int, ranks: int, timeout: float) -> str:
    """A name that no start before this one has used, the same on every rank, for what is kept in torchrun's store.

    That store outlives the ranks, with the addresses of processes that are gone, and PyTorch 2.13 lets a restarted rank
    find them (its issue 135712). Here a rank makes itself known by a number that nobody can have seen, and takes the name
    that is given to this number. RuntimeError if a rank has not come within timeout seconds.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        store.wait([f"name/{mine}"], datetime.timedelta(seconds=timeout))
        name = store.get(f"name/{mine}").decode()
        store.set(f"heard/{name}/{rank}", "yes")
        return name
    missing = set(range(1, ranks))
    end = time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"heard/{mine}/{other}"]):
                missing.remove(other)
            elif store.check([f"here/{other}"]):
                store.set(f"name/{store.get(f'here/{other}').decode()}", mine)
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {sorted(missing)} have not come within {timeout:.0f} s")
        time.sleep(0.02)
    return mine


def join_through_agent(url: str, timeout: datetime.timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """PyTorch's rendezvous by the store of torchrun's agent, in a space of this start's own."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timeout)
    yield dist.PrefixStore(agreed_name(store, rank, ranks, timeout.total_seconds()), store), rank, ranks


dist.register_rendezvous_handler("torchrun", join_through_agent)


def start_distributed(timeout: float = 600) -> None:
    """Joins the process group that the launcher describes (deepspeed, torchrun, srun), or a group of one.

    timeout: seconds that ranks wait for each other to join. Once all are there `Watch` looks after them, with messages
    that name the rank at fault, and collectives are given a day.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        prepare_cpu()
        # DeepSpeed would compile an all-reduce over shared memory at the first start (25 s and a C++ compiler; the
        # quickstart's steps are 3 to 6% faster with it). Without it every CPU run goes through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by names that PyTorch 2.13 renamed: one warning per call site and rank
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    through = "torchrun://" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout), verbose=False, init_method=through)
    clock.watch(deepspeed.comm.comm.cdb)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(days=1))


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def build_engine(model: FamilyModel, stage: StageConfig, merged: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    for parameter in model.parameters():
        if (
            parameter.dim() == 0
        ):  # DeepSpeed 0.19 cannot broadcast a scalar in half precision (seen in _broadcast_model)
            parameter.data = parameter.data.view(1)
    model.offload_checkpoints(merged.get("activation_checkpointing", {}).get("cpu_checkpointing", False))
    offloaded = "device" in merged.get("zero_optimization", {}).get("offload_optimizer", {})
    compile_ops(merged)
    optimizer = build_optimizer(parameter_groups(model, stage), stage.optimizer, offloaded=offloaded)
    if offloaded or not torch.cuda.is_available():  # whether DeepSpeed insists on its compiled CPU Adam
        merged.setdefault("zero_force_ds_cpu_optimizer", torch.cuda.is_available())
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if is_half(merged) else {}
    with nothing_compiled():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda optimizer: learning_rate(optimizer, stage),
            config=copy.deepcopy(merged),
            dist_init_required=False,
        )
    # DeepSpeed makes its float32 weights from the half-precision ones: give them back the bits they lost, so that a
    # hand-over changes nothing.
    set_weights(engine, exact)
    layout_of(engine).create_moments(0)
    place_matrices(engine)
    return engine


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """DeepSpeed 0.19 imports the optimiser Muon to see whether it was chosen, and that one asks for torch.compile, whose back end takes a
    second to import."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def compile_ops(merged: dict[str, Any]) -> None:
    """Compiles what DeepSpeed compiles at its first use, on one rank of each machine before the others load it.

    All at once they disturb each other (0.19: "cannot open shared object file" on all but one).
    """
    zero = merged.get("zero_optimization", {})
    devices = [zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")]
    builders = [AsyncIOBuilder] if "nvme" in devices else []
    if devices[0] in ("cpu", "nvme") and torch.cuda.is_available():
        builders.append(CPUAdamBuilder)
    for builder in builders:
        for first in (True, False):
            if (os.environ.get("LOCAL_RANK", "0") == "0") is first:
                builder().load(verbose=False)
            if dist.get_world_size() > 1:
                dist.barrier()


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Ends an engine; with its last reference goes all of its memory.

    DeepSpeed 0.19's destroy() leaves every ZeRO-3 engine alive in two places: the list of modules in their forward
    pass keeps the model, and a cache on a method of the parameter coordinator keeps the coordinator.
    """
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():  # the cache is inside a decorator for profiler ranges
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
