"""The stack is walked twice a joint step and once in the other stages; vocabulary logits at masked positions only."""

import pytest
import torch
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.blocks.heads import MLMHead
from vlmo_ds.families.vlmo.block import Block


def count_calls(model, kind):
    calls = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, args, out: calls.append((module, args[0].shape)))
    return calls


@pytest.mark.parametrize(
    "tasks, walks",
    [
        ({"mlm": 0.25, "itc": 1.0, "itm": 1.0}, 2),
        ({"itc": 1.0, "mlm": 0.25}, 1),
        ({"textmlm": 1.0}, 1),
        ({"mim": 1.0}, 1),
    ],
)
def test_every_block_runs_once_a_wave(tasks, walks):
    model = tiny_model(tasks)
    calls = count_calls(model, Block)
    model(tiny_batch())
    assert [sum(module is block for module, _ in calls) for block in model.transformer.blocks] == [walks] * 4


def test_vocabulary_projection_sees_masked_positions_only():
    model, batch = tiny_model(), tiny_batch()
    calls = count_calls(model, MLMHead)
    model(batch)
    masked = int((batch["text_labels_mlm"] != -100).sum())
    assert [shape for _, shape in calls] == [torch.Size([masked, 32])]


def test_a_batch_without_masked_words_is_no_error():
    model, batch = tiny_model({"textmlm": 1.0}), tiny_batch()
    batch["text_labels_mlm"].fill_(-100)
    out = model(batch)
    out.loss.backward()
    assert float(out.loss) == 0.0
