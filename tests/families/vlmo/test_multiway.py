"""What may not change an encoding: the company of other streams, padding, the attention kernel, recomputation."""

import pytest
import torch
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.families.vlmo.multiway import Stream

POSITIONS = [{}, {"use_abs_pos_emb": True, "need_relative_position_embed": False, "layer_scale_init_values": None}]


def all_streams(model, batch):
    text = model.embed_texts({"clean": batch["text_ids"], "masked": batch["text_ids_mlm"]}, model.token_types())
    rows, mask = torch.arange(len(batch["image"])), batch["text_masks"]
    return {
        "joint": Stream(text["masked"], mask, rows),
        "text": Stream(text["clean"], mask, vl_twin=True),
        "image": Stream(image_rows_B=rows, vl_twin=True),
        "plain": Stream(text["clean"], mask),
    }


@pytest.mark.parametrize("positions", POSITIONS)
def test_streams_do_not_see_each_other(positions):
    model, batch = tiny_model(**positions).eval(), tiny_batch()
    streams = all_streams(model, batch)
    together = model.encode(streams, batch["image"], model.token_types()[1])
    for name, stream in streams.items():
        alone = model.encode({name: stream}, batch["image"], model.token_types()[1])[name]
        torch.testing.assert_close(together[name].tokens_BLD, alone.tokens_BLD, rtol=0, atol=1e-12)
        if stream.vl_twin:
            torch.testing.assert_close(together[name].twin_BLD, alone.twin_BLD, rtol=0, atol=1e-12)
            assert not torch.allclose(alone.twin_BLD, alone.tokens_BLD)


@pytest.mark.parametrize("positions", POSITIONS)
def test_trimmed_text_gives_the_untrimmed_features(positions):
    model, batch = tiny_model(**positions).eval(), tiny_batch(length=24)
    short = int(batch["text_masks"].sum(1).max())
    assert short < 24
    trimmed = {k: v[:, :short] if k.startswith("text_") else v for k, v in batch.items()}
    long_out = model.encode(all_streams(model, batch), batch["image"], model.token_types()[1])
    short_out = model.encode(all_streams(model, trimmed), batch["image"], model.token_types()[1])
    valid = trimmed["text_masks"].bool()
    for name in ("joint", "text", "plain"):
        a, b = long_out[name].tokens_BLD, short_out[name].tokens_BLD
        assert (a[:, :short][valid] - b[:, :short][valid]).norm() / b.norm() < 1e-9
        assert (a[:, 24:] - b[:, short:]).norm() <= 1e-9 * b.norm()
    for task, loss in model(batch).losses.items():
        torch.testing.assert_close(loss, model(trimmed).losses[task], rtol=1e-9, atol=0)


def losses_and_gradients(model, batch):
    out = model(batch)
    out.loss.backward()
    return {k: v.detach() for k, v in out.losses.items()}, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(a, b, tolerance=1e-10):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "change", [{"attention": "sdpa"}, {"activation_checkpoint_every": 1}, {"activation_checkpoint_every": 2}]
)
def test_kernel_and_recomputation_change_nothing(positions, change):
    batch = tiny_batch()
    expected = losses_and_gradients(tiny_model(attention="explicit", **positions), batch)
    found = losses_and_gradients(tiny_model(**{"attention": "explicit", **positions, **change}), batch)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


def test_recomputation_repeats_stochastic_depth():
    batch, results = tiny_batch(), []
    for every in (0, 1):
        model = tiny_model(drop_path_rate=0.5, activation_checkpoint_every=every)
        torch.manual_seed(7)
        results.append(losses_and_gradients(model, batch))
    assert_same(results[0][1], results[1][1])


def test_stochastic_depth_keeps_the_mean():
    from vlmo_ds.blocks.layers import drop_path

    x, sequence = torch.ones(4000, 1), torch.arange(2000).repeat_interleave(2)
    dropped = drop_path(x, 0.25, sequence, 2000)
    assert torch.equal(dropped[::2], dropped[1::2])  # whole sequences
    assert abs(float(dropped.mean()) - 1.0) < 0.06
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])


def test_mistakes_are_named():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match="16x16 pixels, the model takes 32x32"):
        model({"image": batch["image"][:, :, :16, :16]}, "encode_image")
    with pytest.raises(ValueError, match="text of 30 tokens, the model takes at most 24"):
        model({"text_ids": torch.ones(1, 30, dtype=torch.long)}, "encode_text")
    with pytest.raises(ValueError, match="needs text_BLD or image_rows_B"):
        model.encode({"nothing": Stream()}, batch["image"], model.token_types()[1])
