"""The stack is walked twice a joint step and once in the other stages; vocabulary logits at masked positions only."""

import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_blocks_see_no_masked_patch_where_mim_is_of_visible_ones(drop_path_rate):
    model = tiny_model({"mim": 1.0}, mim_visible_only=True, drop_path_rate=drop_path_rate)
    batch = tiny_batch()
    calls = count_calls(model, Block)
    loss = model(batch).loss
    visible = 5 + int((~batch["image_mask"]).sum())
    assert {shape for _, shape in calls} == {torch.Size([visible, 32])}
    loss.backward()
    of_head = [parameter.grad for name, parameter in model.named_parameters() if name.startswith("mim_score")]
    assert all(grad.abs().max() > 0 for grad in of_head) and "mim_score.mask_token" in dict(model.named_parameters())
    assert model.transformer.mask_token is None


def test_the_decoder_of_masked_patches_is_attention_over_seen_tokens():
    model, batch = tiny_model({"mim": 1.0}, mim_visible_only=True), tiny_batch()
    decoder, tokens = model.mim_score, torch.randn(5, 17, 32, dtype=torch.float64)
    found = decoder(tokens, batch["image_mask"]).split(batch["image_mask"].sum(1).tolist())
    place = torch.cat((torch.zeros(1, 32), decoder.position_PD)).double()
    for image, mask, ours in zip(tokens, batch["image_mask"], found, strict=True):
        keep = torch.cat((torch.tensor([True]), ~mask))
        keys, values = decoder.key_value(decoder.norm_seen(image[keep] + place[keep])).chunk(2, dim=1)
        x = decoder.mask_token + place[1:][mask]
        q = decoder.query(decoder.norm1(x))
        parts = [part.unflatten(1, (4, 8)).transpose(0, 1) for part in (q, keys, values)]
        x = x + decoder.proj(F.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1))
        x = x + decoder.mlp(decoder.norm2(x))
        torch.testing.assert_close(ours, decoder.fc(decoder.norm(x)))


def test_a_batch_without_masked_words_is_no_error():
    model, batch = tiny_model({"textmlm": 1.0}), tiny_batch()
    batch["text_labels_mlm"].fill_(-100)
    out = model(batch)
    out.loss.backward()
    assert float(out.loss) == 0.0
