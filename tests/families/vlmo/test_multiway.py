"""What may not change an encoding: the company of other streams, padding, the attention kernel, recomputation."""

import pytest
import torch
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.blocks.attention import explicit_attention
from vlmo_ds.blocks.layers import drop_path, kept
from vlmo_ds.config import DataConfig
from vlmo_ds.families.vlmo import FAMILY
from vlmo_ds.families.vlmo.block import Block
from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.cost import forward_flops
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


def test_of_the_last_block_only_what_is_read_comes_out():
    """The same tokens as without, and the last block's experts see no others."""
    for vlffn in (3, 4):  # with a block of VL experts, and without
        model, batch = tiny_model(vlffn_start_layer_index=vlffn).eval(), tiny_batch()
        streams = all_streams(model, batch)
        reads = {"joint": "text", "text": "class", "image": "class", "plain": "all"}
        whole = model.encode(streams, batch["image"], model.token_types()[1])
        outputs, last = [], model.transformer.blocks[-1]
        hooks = [
            of.register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
            for name, of in last.named_children()
            if name.startswith("mlp")
        ]
        found = model.encode(
            {name: stream._replace(reads=reads[name]) for name, stream in streams.items()},
            batch["image"],
            model.token_types()[1],
        )
        for hook in hooks:
            hook.remove()
        words, pairs = int(batch["text_masks"].sum()), len(batch["image"])
        twins = 2 if vlffn == 3 else 0
        assert sum(map(len, outputs)) == words + 2 * pairs + words + twins * pairs
        valid = batch["text_masks"].bool()
        for name, stream in streams.items():
            ours, expected = found[name].tokens_BLD, whole[name].tokens_BLD[:, : found[name].tokens_BLD.shape[1]]
            assert ours.shape[1] == {"text": valid.shape[1], "class": 1, "all": valid.shape[1]}[reads[name]]
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
            if stream.vl_twin:
                torch.testing.assert_close(found[name].twin_BLD, whole[name].twin_BLD[:, :1], rtol=1e-12, atol=1e-12)


def test_padding_is_not_computed():
    model, batch = tiny_model({"textmlm": 1.0}), tiny_batch(length=24)
    seen = []
    for block in model.transformer.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((len(args[0]), len(out))))
    model(batch)
    words = int(batch["text_masks"].sum())
    assert words < batch["text_masks"].numel() and seen == [(words, words)] * 4


@pytest.mark.parametrize("recompute, kept", [("none", True), ("cheap", False)])
def test_what_is_computed_again_is_not_kept(recompute, kept):
    from torch.multiprocessing.reductions import StorageWeakRef

    model, outputs = tiny_model(recompute=recompute), []

    def remember(module, args, out):
        normed = out[0] if isinstance(out, tuple) else out
        outputs.append(StorageWeakRef(normed.untyped_storage()))

    for name, module in model.transformer.blocks.named_modules():
        if ".norm" in name:
            module.register_forward_hook(remember)
    out = model(tiny_batch())
    living = sum(not output.expired() for output in outputs)
    assert living == (len(outputs) if kept else 0)
    out.loss.backward()


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
    "change", [{"attention": "sdpa"}, {"recompute": "cheap"}, {"recompute": "blocks"}, {"recompute": 2}]
)
def test_kernel_and_recomputation_change_nothing(positions, change):
    batch = tiny_batch()
    plain = {"attention": "explicit", "recompute": "none", **positions}
    expected = losses_and_gradients(tiny_model(**plain), batch)
    found = losses_and_gradients(tiny_model(**{**plain, **change}), batch)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


def test_recomputation_repeats_stochastic_depth():
    batch, results = tiny_batch(), []
    for recompute in ("none", "cheap", "blocks"):
        model = tiny_model(drop_path_rate=0.5, recompute=recompute)
        torch.manual_seed(7)
        results.append(losses_and_gradients(model, batch))
    for other in results[1:]:
        assert_same(results[0][1], other[1])


def test_stochastic_depth_keeps_the_mean():
    x, sequence = torch.ones(4000, 1), torch.arange(2000).repeat_interleave(2)
    dropped = drop_path(x, 0.25, kept(2000, 0.25)[sequence])
    assert torch.equal(dropped[::2], dropped[1::2])  # whole sequences
    assert abs(float(dropped.mean()) - 1.0) < 0.06
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "rate", [0.4, 0.97]
)  # with the second one whole experts, and whole walks, have no sequence left
def test_what_stochastic_depth_leaves_out_is_not_computed(monkeypatch, positions, rate):
    batch, results, rows = tiny_batch(), [], []

    def with_zeros(self, x_MD, branch, x_ND, layout):
        drop = self.drop_path_rate
        if not drop:
            return x_MD + branch(x_ND, layout)
        keep_S = kept(layout.num_sequences, drop)
        return x_MD + drop_path(branch(x_ND, layout), drop, keep_S[layout.sequence_M])

    def count(module, args, out):
        rows[-1] += len(args[0])

    for added in (Block.added, with_zeros):
        monkeypatch.setattr(Block, "added", added)
        model = tiny_model(drop_path_rate=rate, **positions).train()
        rows.append(0)
        for block in model.transformer.blocks:
            block.norm1.register_forward_hook(count)
        torch.manual_seed(7)
        results.append(losses_and_gradients(model, batch))
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
    assert rows[0] < rows[1]


def test_mistakes_are_named():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match="16x16 pixels, the model takes 32x32"):
        model({"image": batch["image"][:, :, :16, :16]}, "encode_image")
    with pytest.raises(ValueError, match="text of 30 tokens, the model takes at most 24"):
        model({"text_ids": torch.ones(1, 30, dtype=torch.long)}, "encode_text")
    with pytest.raises(ValueError, match="without text_BLD cannot be read for its text"):
        model.encode({"a": Stream(image_rows_B=torch.arange(2), reads="text")}, batch["image"], model.token_types()[1])
    with pytest.raises(ValueError, match="needs text_BLD or image_rows_B"):
        model.encode({"nothing": Stream()}, batch["image"], model.token_types()[1])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("twin", [True, False])
def test_patches_that_are_left_out_are_those_that_attention_does_not_see(positions, twin, monkeypatch):
    """The class token of all patches, where attention masks some of them, is that of the others alone."""
    model, batch = tiny_model(**positions).eval(), tiny_batch()
    tokens = torch.tensor([0, 2, 3, 9, 16])
    stream = Stream(image_rows_B=torch.tensor([3, 0]), vl_twin=twin, reads="class")
    image_type = model.token_types()[1]
    found = model.encode({"a": stream._replace(image_tokens_K=tokens)}, batch["image"], image_type)["a"]

    def masked(q, k, v, bias_HLS, key_mask_BS):
        seen = torch.zeros(len(q), 17).index_fill(1, tokens, 1.0)
        return explicit_attention(q, k, v, bias_HLS, seen)

    monkeypatch.setattr("vlmo_ds.families.vlmo.block.attention_kernel", lambda *_: masked)
    expected = model.encode({"a": stream}, batch["image"], image_type)["a"]
    torch.testing.assert_close(found.tokens_BLD, expected.tokens_BLD, rtol=1e-12, atol=1e-12)
    if twin:
        torch.testing.assert_close(found.twin_BLD, expected.twin_BLD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
def test_patches_that_no_block_sees_are_as_if_there_were_none(positions):
    """Other ones of each image."""
    model, batch = tiny_model(**positions).eval(), tiny_batch()
    tokens = [torch.tensor([0, 2, 3, 9, 16]), torch.tensor([0, 1, 15])]
    seen = torch.stack([torch.zeros(17, dtype=torch.bool).index_fill(0, of, True) for of in tokens])
    image_type, rows = model.token_types()[1], torch.tensor([3, 0])
    stream = Stream(image_rows_B=rows, seen_BL=seen)
    found = model.encode({"a": stream}, batch["image"], image_type)["a"].tokens_BLD
    assert found.shape == (2, 17, 32) and (found[~seen] == 0).all()
    for image, (row, of) in enumerate(zip(rows, tokens, strict=True)):
        alone = Stream(image_rows_B=row[None], image_tokens_K=of)
        expected = model.encode({"a": alone}, batch["image"], image_type)["a"].tokens_BLD[0]
        torch.testing.assert_close(found[image, of], expected, rtol=1e-12, atol=1e-12)


def test_contrast_leaves_patches_out_in_training_alone_and_others_each_step():
    model, batch = tiny_model(patch_dropout=0.4).train(), tiny_batch()
    seen = [model.patches_seen({"step_seed": torch.tensor(step)}) for step in range(300)]
    assert all(len(tokens) == 1 + 10 and tokens[0] == 0 and (tokens.diff() > 0).all() for tokens in seen)
    counts = torch.cat(seen).bincount(minlength=17)
    assert counts[0] == 300 and (counts[1:] - 300 * 10 / 16).abs().max() < 40  # 5 standard deviations
    assert torch.equal(model.patches_seen(batch), model.patches_seen(batch))
    whole = tiny_model().train()
    for task, loss in model(batch).losses.items():
        assert (loss == whole(batch).losses[task]) == (task == "mlm"), task  # itm draws by features of contrast
    features = model.contrast_features(batch)["vl_image"]
    assert not torch.allclose(features, whole.contrast_features(batch)["vl_image"])
    torch.testing.assert_close(model.eval().contrast_features(batch), whole.eval().contrast_features(batch))


def test_contrast_with_fewer_patches_costs_less():
    """In proportion: attention is a small part here."""
    stage = FAMILY.stage(name="a", tasks={"irtr": 1.0}, data=DataConfig(shards=["-"]), global_batch_size=8, steps=1)
    config = VLMoSettings(arch="vlmo_base_patch16", vocab_size=30522, max_text_len=3)
    whole, half = (forward_flops(config.model_copy(update={"patch_dropout": rate}), stage) for rate in (0.0, 0.5))
    assert 0.47 < half / whole < 0.53
