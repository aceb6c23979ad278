"""What plan says of a step against what a step does."""

import pytest
import torch
from families.beit3.tiny import ALL, MASKED, SETTINGS, streams_of, tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from vlmo_ds.families import FAMILIES
from vlmo_ds.families.beit3 import block
from vlmo_ds.families.interface import Load


def stage_of(tasks, **data):
    data = {"shards": ["-"], "mlm_probability": 0.25, "mim_ratio": 0.5, **data}
    return FAMILIES["beit3"].stage(
        name="a", tasks=tasks, data=data, streams=streams_of(tasks, data), global_batch_size=8, steps=1
    )


def whole_batch(batch: int = 8, length: int = 24) -> dict[str, torch.Tensor]:
    """Every text as long as it may be, a quarter of its words and half of the patches masked."""
    found = tiny_batch(batch, length)
    for kind, words in (("", "text_"), ("images/", ""), ("texts/", "text_")):
        if words:
            ids = torch.randint(5, 49, (batch, length))
            labels = ids.masked_fill(torch.arange(length) % 4 > 0, -100)
            found |= {f"{kind}text_ids": ids, f"{kind}text_masks": torch.ones_like(ids)}
            found |= {f"{kind}text_ids_mlm": ids, f"{kind}text_labels_mlm": labels}
        if kind != "texts/":
            found[f"{kind}image"] = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
            found[f"{kind}image_mask"] = (torch.arange(16) % 2 == 0).expand(batch, -1)
            found[f"{kind}visual_tokens"] = torch.zeros(batch, 16, dtype=torch.int64)
    found["image_0"] = found["image_1"] = found["image"]
    found["image_id"] = found["sample_id"] = torch.arange(batch)
    return found


GROUPS = [
    *({task: 1.0} for task in ("mim", "textmlm", "mvlm", "itc", "irtr", "nlvr2", "captioning", "classification")),
    MASKED,
    ALL,
]


@pytest.mark.parametrize("views", ["two", "one"])
@pytest.mark.parametrize("tasks", GROUPS, ids=",".join)
def test_operations_of_a_forward_pass(tasks, views, monkeypatch):
    # the counter does not know torch's attention on CPUs
    monkeypatch.setattr(block, "attend", lambda q, k, v, mask: (q @ k.transpose(-2, -1)).softmax(-1) @ v)
    model, stage = tiny_model(tasks, pair_views=views), stage_of(tasks)
    batch = whole_batch()
    if "captioning" in tasks:
        batch = {name: value for name, value in batch.items() if not name.endswith("mlm")}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    counted, said = counter.get_total_flops(), FAMILIES["beit3"].cost().forward_flops(model.config, stage, 8)
    # padded places of the last block's queries, and the contrast's logits, are not told of
    assert said == pytest.approx(counted, rel=0.05)


def test_weights_that_mined_pairs_pass_count_twice():
    tasks = {"itc": 1.0, "itm": 1.0}
    model, calls = tiny_model(tasks), {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(
                lambda module, args, out, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
    model(tiny_batch())
    walks = FAMILIES["beit3"].cost().walks(model, stage_of(tasks))
    for name, times in walks.items():
        module = name.rpartition(".")[0]
        if module:  # the scale is the model's own
            assert times == (calls.get(module, 0) if "mask_token" not in name else 0), name


def test_memory_and_bytes_on_the_wire_are_there_for_every_task():
    config = FAMILIES["beit3"].config(**SETTINGS, vocab_size=50)
    cost, load = FAMILIES["beit3"].cost(), Load(8, 2, 4, 2, False)
    for tasks in GROUPS:
        stage = stage_of(tasks)
        memory = cost.activations(config, stage, load)
        assert memory["activations"] > 0 and (memory["logits"] > 0) == (not {"nlvr2", "classification"} & tasks.keys())
        assert (memory["collector"] > 0) == ("itm" in tasks)
        wire = cost.collectives(config, stage, load)
        assert (sum(wire.values()) > 0) == bool({"itc", "irtr"} & tasks.keys())
    pairs, whole = stage_of({"mvlm": 1.0}), stage_of(MASKED)
    more = whole.model_copy(
        update={"streams": {n: s.model_copy(update={"global_batch_size": 16}) for n, s in whole.streams.items()}}
    )
    found = [cost.forward_flops(config, stage, 1) for stage in (pairs, whole, more)]
    assert found[2] - found[0] == pytest.approx(2 * (found[1] - found[0]))  # twice as many images and texts alone
    plain, cheap = (
        cost.activations(config.model_copy(update={"recompute": recompute}), stage_of(ALL), load)["activations"]
        for recompute in ("none", "cheap")
    )
    assert cheap < 0.7 * plain
