"""A machine that computes wrongly is found and named (check_bits), and a run in which nothing is found is the run without the checks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, start_ranks, tiny_recipe, write_yaml
from families.blip.tiny import tiny_blip

from vlmo_ds.training.bits import checksum, minority

PERSISTENT = "transformer.norm.weight"


def worker(fault: str, arguments: list[str]) -> None:
    """train_ds.py, of whose ranks the last gets something wrong at step 4."""
    from vlmo_ds.training.bits import Bits
    from vlmo_ds.training.run import main

    compare, passed = Bits.compare, Bits.passed
    times = [0]

    def flip(value: torch.Tensor) -> None:
        value.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 20)

    def mine(self) -> bool:
        return self.collector.rank == self.collector.world_size - 1

    def compared(self, step):

        if fault == "parameter" and mine(self) and step == 4:
            flip(dict(self.engine.module.named_parameters())[PERSISTENT].data)
        compare(self, step)

    def passes(self, model, one):
        times[0] += 1
        wrong = mine(self) and times[0] == 4  # the second one of step 4
        hook = None
        if wrong and fault == "backward":
            parameter = dict(model.named_parameters())[PERSISTENT]
            hook = parameter.register_hook(lambda gradient: flip(gradient))
        if wrong and fault == "forward":
            hook = model.transformer.norm.register_forward_hook(lambda module, given, found: flip(found))
        try:
            return passed(self, model, one)
        finally:
            if hook:
                hook.remove()

    Bits.compare, Bits.passed = compared, passes
    sys.exit(main(arguments))


def arguments(folder: Path, data: Path, zero: int, *settings: str, whole: int = 0) -> list[str]:
    """whole: parameters of at most so many elements are whole on every rank under ZeRO-3."""
    folder.mkdir(exist_ok=True)
    recipe = tiny_recipe(data, retrieval=None)
    recipe["model"] |= {"drop_path_rate": 0.3, "patch_dropout": 0.3}
    for stage in recipe["stages"]:
        stage |= {"steps": 4, "checkpoint_every": 2, "micro_batch_size": 2}
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0]["init"] = {"weights": "fresh"}
    spread = {"stage": zero} | ({"stage3_param_persistence_threshold": whole} if zero == 3 else {})
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    words = ["--recipe", str(write_yaml(folder / "recipe.yaml", recipe)), "--deepspeed_config", str(folder / "ds.json")]
    return [*words, "--output_dir", str(folder / "run"), *settings]


def ended(folder: Path, data: Path, fault: str, ranks: int, zero: int) -> str:
    """What all ranks have written."""
    words = arguments(folder, data, zero, "check_bits=2", whole=100 if fault == "parameter" else 0)
    code = f"from faults.test_bits import worker; worker({fault!r}, {words!r})"
    processes = start_ranks(["-c", code], ranks)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [4] * ranks, outputs
    return "\n".join(outputs)


@pytest.mark.parametrize(
    "ranks, zero",
    [(2, 2), (2, 3), (1, 0), *(pytest.param(*of, marks=pytest.mark.long) for of in ((1, 2), (1, 3), (2, 0), (2, 1)))],
)
def test_a_run_with_checks_is_the_run_without(tmp_path, synthetic, ranks, zero):
    plain, checked = (
        arguments(tmp_path / name, synthetic, zero, *more) for name, more in (("a", ()), ("b", ("check_bits=1",)))
    )
    outputs = [run_ranks(["train_ds.py", *words], ranks) for words in (plain, checked)]
    assert "check_bits" not in outputs[1]
    a, b = ((tmp_path / name / "run" / "metrics.jsonl").read_text() for name in ("a", "b"))
    assert a == b and a.count("\n") == 4
    assert not (tmp_path / "b" / "run" / "post_mortem").exists()


@pytest.mark.parametrize(
    "fault, ranks, zero, what, who",
    [
        ("parameter", 4, 2, f"the ranks have different bits in {PERSISTENT}: it differs on rank 3 on", [3]),
        pytest.param(
            "parameter",
            2,
            3,
            f"different bits in {PERSISTENT}: it differs on rank 0 on",
            [0, 1],
            marks=pytest.mark.long,
        ),
        ("backward", 2, 2, f"has given different bits in the gradient of {PERSISTENT} on rank 1 on", [1]),
        ("backward", 1, 0, f"has given different bits in the gradient of {PERSISTENT} on rank 0 on", [0]),
        ("forward", 2, 3, "has given different bits in what it sends in its forward pass", [1]),
    ],
)
def test_a_wrong_bit_is_found_and_named(tmp_path, synthetic, fault, ranks, zero, what, who):
    output = ended(tmp_path, synthetic, fault, ranks, zero)
    assert output.count("error: joint, step 4: ") == 1 and what in output and "Traceback" not in output
    run = tmp_path / "run"
    evidence = json.loads((run / "post_mortem" / "bits.json").read_text())
    assert evidence["at_fault"] == who and len(evidence["ranks"]) == ranks and evidence["step"] == 4
    assert (run / "post_mortem" / "cause.txt").read_text().strip() == evidence["cause"]
    assert [path.name for path in sorted((run / "checkpoints" / "joint").glob("step-????????"))] == ["step-00000002"]
    if fault == "forward":
        assert "resumed at step 2" in run_ranks(["train_ds.py", *arguments(tmp_path, synthetic, zero)], ranks)
        assert (run / "post_mortem.before-1" / "bits.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
def test_a_teacher_and_its_queue_are_left_alone(tmp_path, synthetic, zero):
    recipe = tiny_blip(synthetic, retrieval=None, captioning=None)
    spread = {"stage": zero} | ({"stage3_param_persistence_threshold": 0} if zero == 3 else {})
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": spread, "steps_per_print": 10**9}))
    words = ["train_ds.py", "--recipe", write_yaml(tmp_path / "recipe.yaml", recipe)]
    words += ["--deepspeed_config", tmp_path / "ds.json", "--output_dir"]
    run_ranks([*words, tmp_path / "a"], 2)
    run_ranks([*words, tmp_path / "b", "check_bits=1"], 2)
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("a", "b"))
    assert a == b and a.count("\n") == 6


def test_a_checksum_tells_every_bit_and_no_order_of_summing():
    values = torch.randn(5000)
    sums = {int(checksum(values))}
    for place in (0, 1, 4999):
        for bit in range(32):
            other = values.clone()
            other.view(torch.int32)[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            sums.add(int(checksum(other)))
    assert len(sums) == 1 + 3 * 32
    swapped = values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    assert checksum(swapped) != checksum(values)
    for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.int64):
        assert checksum(values.to(kind)).dtype == torch.int64
    assert checksum(torch.tensor(float("nan"))) == checksum(torch.tensor(float("nan")))


def test_the_few_are_at_fault():
    assert minority([[5, 5, 6, 5]]) == [2]
    assert minority([[5, 6]]) == [0, 1]
    assert minority([[5, 5, 6], [1, 2, 2]]) == [0, 2]
