"""BEiT-3's model: recorded numbers, one packed walk against padded passes, what each task reaches, captions, official files."""

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from families.beit3.tiny import ALL, MASK, MASKED, streams_of, tiny_batch, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.config import DecodingConfig, InitConfig, RecipeError
from vlmo_ds.distributed import rows
from vlmo_ds.families import FAMILIES
from vlmo_ds.families.beit3.backbone import Stream
from vlmo_ds.families.beit3.block import Block
from vlmo_ds.families.beit3.model import PairClassifier
from vlmo_ds.families.beit3.parity import compare
from vlmo_ds.families.beit3.weights import IMAGE_POSITIONS, TEXT_POSITIONS, official
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.interface import matches
from vlmo_ds.generation.decoding import KeyValueCache, written
from vlmo_ds.objectives.captioning import hidden_words
from vlmo_ds.weights_file import read_weights

ALONE = ("irtr", "vqa", "nlvr2", "captioning", "classification")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_numbers(dtype):
    found = list(compare(torch.load(golden("beit3_A.pt"), weights_only=True), dtype))
    assert len(found) > 600
    assert not [(name, difference) for name, difference, bar in found if not difference <= bar]


@pytest.mark.parametrize("weight", ["vision_embed.mask_token", "encoder.layers.1.self_attn.k_proj.B.weight"])
def test_a_wrong_weight_is_noticed(weight):
    recorded = torch.load(golden("beit3_A.pt"), weights_only=True)
    of_retrieval = recorded["state_dict"]["retrieval"]
    of_retrieval[f"beit3.{weight}"] = of_retrieval[f"beit3.{weight}"].roll(1, -1)
    failed = {name for name, difference, bar in compare(recorded, torch.float64) if not difference <= bar}
    assert ("image_masked.image" if "mask" in weight else "text.text") in failed and "image.image" not in failed


@pytest.mark.parametrize("arch, millions", [("beit3_base_patch16", 222), ("beit3_large_patch16", 675)])
def test_sizes(arch, millions):
    family = FAMILIES["beit3"]
    with torch.device("meta"):
        model = family.build(family.config(arch=arch), {"irtr": 1.0}, None)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_initial_weights_are_scaled_with_the_depth():
    family = FAMILIES["beit3"]
    blocks = {}
    for depth in (2, 12):
        torch.manual_seed(0)
        blocks[depth] = family.build(family.config(depth=depth, vocab_size=20), {}, None).beit3.encoder.layers[0]
    for name, weight in blocks[12].named_parameters():
        if name.endswith("weight") and weight.dim() == 2:
            scaled = not any(part in name for part in ("q_proj", "k_proj"))
            ratio = (torch.tensor(24.0).log() / torch.tensor(4.0).log()).sqrt() if scaled else torch.tensor(1.0)
            before = blocks[2].get_parameter(name)
            assert float(weight.std() / before.std()) == pytest.approx(float(ratio), rel=0.02), name
        elif name.endswith("bias"):
            assert not weight.any()


# ---- one packed walk ----


def padded(model, batch: dict, rows=None, mask=None, ids="", causal: bool = False) -> torch.Tensor:
    """[B, I + L, D]: a pass of its own, with padding, and by both experts whatever a token is."""
    beit3, parts, keys = model.beit3, [], []
    encoder = beit3.encoder
    if rows is not None:
        embed = beit3.vision_embed
        x = embed.proj(batch["image"]).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[:, :, None], embed.mask_token, x)
        x = torch.cat((embed.cls_token.expand(len(x), -1, -1), x), 1)
        parts.append(x + encoder.embed_positions["A"].weight[2:])
        keys.append(torch.ones(x.shape[:2], dtype=torch.bool))
    if ids:
        x = beit3.text_embed(batch[ids])
        keys.append(batch["text_masks"].bool())
        parts.append((x + encoder.embed_positions["B"].weight[2 : 2 + x.shape[1]]) * keys[-1][:, :, None])
    x, key = torch.cat(parts, 1), torch.cat(keys, 1)
    images = parts[0].shape[1] if rows is not None else 0
    is_text = torch.arange(x.shape[1])[:, None] >= images
    allowed = key[:, None, None]
    if causal:
        place = torch.arange(x.shape[1])
        allowed = allowed & ((place[None] <= place[:, None]) | (place < images))

    def by_both(layer, x):
        return torch.where(is_text, layer["B"](x), layer["A"](x))

    def split(x):
        return x.unflatten(-1, (4, -1)).transpose(1, 2)

    for block in encoder.layers:
        attn, normed = block.self_attn, by_both(block.self_attn_layer_norm, x)
        q, k, v = (split(by_both(layer, normed)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + by_both(attn.out_proj, by_both(attn.inner_attn_ln, mixed))
        normed = by_both(block.final_layer_norm, x)
        outs = [ffn.fc2(ffn.ffn_layernorm(F.gelu(ffn.fc1(normed)))) for ffn in (block.ffn["A"], block.ffn["B"])]
        x = x + torch.where(is_text, outs[1], outs[0])
    return by_both(encoder.layer_norm, x)


KINDS = {
    "text": {"ids": "text_ids"},
    "image": {"rows": True},
    "masked image": {"rows": True, "mask": True},
    "pair": {"rows": True, "ids": "text_ids"},
    "masked pair": {"rows": True, "mask": True, "ids": "text_ids_mlm"},
    "caption": {"rows": True, "ids": "text_ids_mlm", "causal": True},
}


@torch.no_grad()
def test_one_packed_walk_is_as_good_as_padded_passes():
    """All kinds of streams together; each read as a whole, for its first tokens, and for some of them."""
    model, batch = tiny_model(), tiny_batch()
    rows, valid, labels = torch.arange(5), batch["text_masks"].bool(), batch["text_labels_mlm"] != -100
    patches = F.pad(batch["image_mask"], (1, 0))
    streams, wanted = {}, {}
    for kind, of in KINDS.items():
        mask = batch["image_mask"] if of.get("mask") else None
        ids, of_images = batch.get(of.get("ids")), of.get("rows")
        wanted[kind] = padded(model, batch, of_images, mask, of.get("ids", ""), of.get("causal", False))
        whole = Stream(
            rows if of_images else None, mask, ids, None if ids is None else batch["text_masks"], "causal" in of
        )
        streams[kind, "all"] = whole
        streams[kind, "first"] = whole._replace(read_image="first", read_text="first")
        streams[kind, "some"] = whole._replace(read_image=patches, read_text=labels)
        if kind in ("pair", "caption"):
            streams[kind, "text"] = whole._replace(read_image="none", read_text=labels)
    found = model.encode(streams, batch["image"])
    for (kind, read), (image, text) in found.items():
        images = 17 if KINDS[kind].get("rows") else 0
        of_image, of_text = wanted[kind].split((images, wanted[kind].shape[1] - images), 1)
        pick = {
            "all": (lambda x: x, lambda x: x[valid]),
            "first": (lambda x: x[:, 0], lambda x: x[:, 0]),
            "some": (lambda x: x[patches], lambda x: x[labels]),
            "text": (None, lambda x: x[labels]),
        }[read]
        assert (image is not None) == bool(images and read != "text") and (text is not None) == ("ids" in KINDS[kind])
        if image is not None:
            torch.testing.assert_close(image, pick[0](of_image), rtol=1e-9, atol=1e-10)
        if text is not None:
            ours = text[valid] if read == "all" else text
            torch.testing.assert_close(ours, pick[1](of_text), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "tasks, walks",
    [(MASKED, 1), ({**MASKED, "itc": 1.0}, 1), (ALL, 2), *(({task: 1.0}, 1) for task in (*MASKED, *ALONE))],
)
def test_every_block_runs_once_a_walk(tasks, walks):
    model, calls = tiny_model(tasks), []
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda block, args, out: calls.append((block, len(args[0]), len(out))))
    batch = tiny_batch()
    model(batch)
    blocks = model.beit3.encoder.layers
    assert [sum(of is block for of, _, _ in calls) for block in blocks] == [walks] * 3
    if (
        tasks == MASKED
    ):  # images alone, pairs in two views; padding is not among the rows, and unmasked tokens do not come out
        words, patches = (int(batch[f"{kind}_masks"].sum()) for kind in ("texts/text", "text")), 17 * (4 + 2 * 5)
        assert calls[0][1] == patches + next(words) + 2 * next(words)
        masked = [batch[k] for k in ("image_mask", "images/image_mask")]
        masked += [batch[k] != -100 for k in ("text_labels_mlm", "texts/text_labels_mlm")]
        assert calls[-1][2] == sum(int(of.sum()) for of in masked)


def test_losses_of_a_step_are_those_of_passes_of_their_own():
    model, batch = tiny_model(), tiny_batch()
    out = model(batch)
    labels, hidden = batch["text_labels_mlm"], batch["image_mask"]

    def words(x, labels):
        return F.cross_entropy(model.mlm_head(x[:, -labels.shape[1] :][labels != -100]), labels[labels != -100])

    def patches(x, hidden, tokens):
        return F.cross_entropy(model.mim_head(x[:, 1:17][hidden]), tokens[hidden])

    alone = {name.partition("/")[2]: value for name, value in batch.items() if "/" in name}
    mim = patches(padded(model, alone, True, alone["image_mask"]), alone["image_mask"], alone["visual_tokens"])
    textmlm = words(padded(model, alone, ids="text_ids_mlm"), alone["text_labels_mlm"])
    views = padded(model, batch, True, None, "text_ids_mlm"), padded(model, batch, True, hidden, "text_ids")
    mvlm = words(views[0], labels) + patches(views[1], hidden, batch["visual_tokens"])
    for name, expected in (("mim", mim), ("textmlm", textmlm), ("mvlm", mvlm)):
        torch.testing.assert_close(out.losses[name], expected, rtol=1e-9, atol=1e-10)
    one = tiny_model(pair_views="one")
    both = padded(one, batch, True, hidden, "text_ids_mlm")
    expected = words(both, labels) + patches(both, hidden, batch["visual_tokens"])
    torch.testing.assert_close(one(batch).losses["mvlm"], expected, rtol=1e-9, atol=1e-10)
    right, count = out.ratios["mim/accuracy"]
    assert int(count) == int(alone["image_mask"].sum()) and 0 <= right <= count


def test_a_batch_in_which_nothing_is_masked_has_no_loss_and_no_gradient():
    model, batch = tiny_model(MASKED), tiny_batch()
    for name, value in batch.items():
        if name.endswith("labels_mlm"):
            batch[name] = torch.full_like(value, -100)
        elif name.endswith("image_mask"):
            batch[name] = torch.zeros_like(value)
    out = model(batch)
    out.loss.backward()
    assert float(out.loss) == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_batch_without_visual_tokens_is_told_of():
    batch = tiny_batch()
    del batch["images/visual_tokens"]
    with pytest.raises(ValueError, match=r"model\.visual_tokenizer"):
        tiny_model({"mim": 1.0})(batch)


@pytest.mark.parametrize(
    "tasks",
    [*({task: 1.0} for task in ("mim", "textmlm", "mvlm", "itc", *ALONE)), {"itc": 1.0, "itm": 1.0}, MASKED, ALL],
    ids=",".join,
)
def test_tasks_reach_what_they_say(tasks):
    model, batch = tiny_model(tasks), tiny_batch()
    model(batch).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
    trained = {name for name, _ in model.named_parameters() if not matches(name, model.idle())}
    still = {name for name in trained if "k_proj" in name and name.endswith("bias")}  # zero but for rounding
    assert trained - still <= reached <= trained
    walks = FAMILIES["beit3"].cost().walks
    data = {"shards": ["-"]}
    streams = streams_of(tasks, data)
    stage = FAMILIES["beit3"].stage(name="a", tasks=tasks, data=data, streams=streams, global_batch_size=8, steps=1)
    assert {name for name, times in walks(model, stage).items() if times} == trained


@pytest.mark.parametrize("tasks", [ALL, {"captioning": 1.0}], ids=",".join)
@pytest.mark.parametrize("recompute", ["cheap", "blocks", 2])
def test_recomputed_layers_give_the_same_gradients(tasks, recompute):
    found = []
    for setting in ("none", recompute):
        model = tiny_model(tasks, recompute=setting).train()
        model(tiny_batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_what_norms_and_gelu_give_is_not_kept_where_it_is_cheap(recompute):
    found = []

    def norm(x, weight, bias, eps):
        out = F.layer_norm(x, weight.shape, weight, bias, eps)
        found.append(StorageWeakRef(out.untyped_storage()))
        if x.shape[1] == 128:  # what GELU gives
            found.append(StorageWeakRef(x.untyped_storage()))
        return out

    model = tiny_model({"mvlm": 1.0}, recompute=recompute).train()
    for module in model.beit3.encoder.layers.modules():
        if isinstance(module, LayerNorm):
            module.kernel = norm
    loss = model(tiny_batch()).loss
    assert len(found) == 3 * 2 * (4 + 1)
    assert [of.expired() for of in found] == [recompute != "none"] * len(found)
    loss.backward()
    assert all(of.expired() for of in found[:30])


@pytest.mark.parametrize("rate", [0.5, 0.99])  # with the second one hardly a sequence is left
def test_what_stochastic_depth_leaves_out_is_not_computed(monkeypatch, rate):
    found, computed = [], []

    def with_zeros(self, x_MD, branch, x_ND, layout):
        keep_S = torch.rand(layout.num_sequences) >= self.drop_path_rate if self.drop_path_rate else torch.ones(1)
        of_rows = (keep_S[layout.sequence_M] if self.drop_path_rate else keep_S).double()
        return x_MD + of_rows[:, None] / (1 - self.drop_path_rate) * branch(x_ND, layout)

    for added in (Block.added, with_zeros):
        monkeypatch.setattr(Block, "added", added)
        model = tiny_model(drop_path_rate=rate).train()
        attn = model.beit3.encoder.layers[1].self_attn.k_proj
        for expert in attn.values():
            expert.register_forward_hook(lambda module, args, out: computed.append(len(args[0])))
        torch.manual_seed(7)
        out = model(tiny_batch())
        out.loss.backward()
        found.append({"": out.loss.detach()} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        computed.append(0)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    less, more = (sum(computed[: computed.index(0)]), sum(computed[computed.index(0) :]))
    assert less < more


def test_every_expert_runs_where_stochastic_depth_leaves_it_no_sequence(monkeypatch):
    """Otherwise ranks would wait for each other's modules."""
    from vlmo_ds.blocks import branch

    monkeypatch.setattr(branch, "kept", lambda sequences, rate: torch.arange(sequences) < 4)  # of mim, images alone
    model, calls = tiny_model(MASKED, drop_path_rate=0.5).train(), []
    block = model.beit3.encoder.layers[1]
    for name, module in block.named_modules():
        if isinstance(module, (torch.nn.Linear, LayerNorm)):
            module.register_forward_hook(lambda module, args, out, name=name: calls.append((name, len(args[0]))))
    model(tiny_batch()).loss.backward()
    assert dict(calls) == {name: 0 if ".B" in name else 17 * 4 for name, _ in calls} and len(calls) == 2 * 10
    assert all(parameter.grad is not None for parameter in block.parameters())


# ---- contrast and matching ----


def test_negatives_are_other_pairs_and_their_texts_are_the_texts():
    model, batch, seen = tiny_model({"itc": 1.0, "itm": 1.0}), tiny_batch(), []
    model.itm_pooler.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch)
    matched, wrong_image, wrong_text = seen[0].chunk(3)

    def of_pair(image: int, text: int):
        pair = {"image": batch["image"][[image]]} | {k: batch[k][[text]] for k in ("text_ids", "text_masks")}
        return model.class_of_pairs(pair)[0]

    for i in range(5):
        torch.testing.assert_close(matched[i], of_pair(i, i), rtol=1e-9, atol=1e-10)
        of_others = [j for j in range(5) if j != i]
        assert any(torch.allclose(wrong_image[i], of_pair(j, i), rtol=1e-9, atol=1e-10) for j in of_others)
        assert any(torch.allclose(wrong_text[i], of_pair(i, j), rtol=1e-9, atol=1e-10) for j in of_others)


def test_negatives_are_the_hard_ones(monkeypatch):
    """Without noise the most similar ones: an image for each text, a text for each image."""
    monkeypatch.setattr(
        rows, "gumbel_noise", lambda seed, query_B, candidate_C: torch.zeros(len(query_B), len(candidate_C))
    )
    model, batch, exchanged = tiny_model({"itc": 1.0, "itm": 1.0}), tiny_batch(), []
    exchange = model.collector.exchange
    model.collector.exchange = lambda tables, wanted: exchanged.append(wanted) or exchange(tables, wanted)
    model(batch)
    similar = model.encode_image(batch)["image"] @ model.encode_text(batch)["text"].t()
    others = similar.masked_fill(torch.eye(5, dtype=torch.bool), -2.0)
    of_texts, of_images, _ = exchanged[0]
    assert torch.equal(of_texts, others.argmax(0)) and torch.equal(of_images, others.argmax(1))
    assert not torch.equal(of_texts, of_images)


def test_another_caption_of_an_image_is_no_negative():
    model, batch = tiny_model({"itc": 1.0, "itm": 1.0}), tiny_batch(batch=4)
    batch["image_id"] = torch.tensor([0, 0, 0, 1])
    exchanged = []
    exchange = model.collector.exchange
    model.collector.exchange = lambda tables, wanted: exchanged.append(wanted) or exchange(tables, wanted)
    model(batch)
    for wanted in exchanged[0]:
        assert wanted[:3].tolist() == [3, 3, 3] and wanted[3] < 3


@torch.no_grad()
def test_calls_of_single_samples_are_those_of_a_batch():
    """Neither padding nor other samples matter, and several questions of an image are asked of one."""
    batch = tiny_batch()
    calls = {"encode_text": "irtr", "encode_image": "irtr", "match": "itm", "answer": "vqa", "compare": "nlvr2"}
    for call, task in calls.items():
        model = tiny_model({"itc": 1.0, "itm": 1.0} if task == "itm" else {task: 1.0}).eval()
        whole = model(batch, call)
        for row in range(5):
            alone = {name: value[row : row + 1] for name, value in batch.items() if value.dim() and "/" not in name}
            length = int(alone["text_masks"].sum())
            alone |= {name: alone[name][:, :length] for name in ("text_ids", "text_masks")}
            one = model(alone, call)
            if isinstance(whole, dict):
                one, expected = (next(iter(of.values())) for of in (one, whole))
            else:
                expected = whole
            torch.testing.assert_close(one[0], expected[row], rtol=1e-9, atol=1e-10)
    model = tiny_model({"vqa": 1.0}).eval()
    asked = {**batch, "image": batch["image"][[0, 2]], "question_image": torch.tensor([0, 0, 0, 1, 1])}
    repeated = {**batch, "image": batch["image"][[0, 0, 0, 2, 2]]}
    torch.testing.assert_close(model(asked, "answer"), model(repeated, "answer"), rtol=1e-9, atol=1e-10)


# ---- captions ----


def test_hidden_words_are_a_share_of_each_caption_and_the_same_wherever_it_is():
    lengths, ids = torch.tensor([3, 9, 16, 2]), torch.arange(4) + 50
    hidden = hidden_words(lengths, 16, 0.6, 5, ids, None)
    assert hidden.sum(1).tolist() == [2, 5, 10, 1]
    assert not hidden[:, 0].any() and not (hidden & (torch.arange(16) >= lengths[:, None])).any()
    assert torch.equal(hidden_words(lengths[1:3], 12, 0.6, 5, ids[1:3], None)[0], hidden[1, :12])
    assert not torch.equal(hidden_words(lengths, 16, 0.6, 6, ids, None), hidden)
    behind = hidden_words(lengths[1:3], 16, 0.6, 5, ids[1:3], torch.tensor([4, 14]))
    assert behind.sum(1).tolist() == [5, 2] and not behind[0, :4].any() and not behind[1, :14].any()
    ends = sum(
        bool(hidden_words(torch.tensor([6]), 8, 0.6, seed, torch.tensor([1]), None)[0, 5]) for seed in range(400)
    )
    assert 280 < ends < 360  # 4 of 5 places: the end is as often hidden as another word


def test_the_loss_of_captions_is_that_of_smoothed_targets():
    model, batch = tiny_model({"captioning": 1.0}), tiny_batch()
    hidden = hidden_words(batch["text_masks"].sum(1), 16, 0.6, 7, batch["sample_id"], None)
    seen = {**batch, "hidden": batch["text_ids"].masked_fill(hidden, MASK)}
    plain = {name: value for name, value in batch.items() if not name.endswith("mlm")}
    logits = model.mlm_head(padded(model, seen, True, None, "hidden", True)[:, 17:][hidden])
    targets = torch.full_like(logits, 0.1 / 49).scatter_(1, batch["text_ids"][hidden][:, None], 0.9)
    expected = F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")
    torch.testing.assert_close(model(plain).losses["captioning"], expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"method": "beam", "beams": 3, "num_return_sequences": 2}])
def test_captions_with_a_cache_are_those_without(settings):
    """Every word by a pass over the whole text with a mask word behind it, from nothing, against the cached step."""
    model, batch = tiny_model({"captioning": 1.0}).eval(), tiny_batch()
    given = {"image": batch["image"], "image_id": batch["image_id"]}
    config = DecodingConfig(max_length=12, **settings)
    ours = written(model, given, [3, 7], 4, config)
    steps = []
    step = type(model).caption_step

    def anew(self, inputs):
        """Words so far by the cache's rows, which beam search reorders."""
        cache = inputs["cache"]
        ids = inputs["text_ids"]
        shape = (len(ids), 1, ids.shape[1], 1)
        so_far, _ = cache.update(ids.view(shape).double(), ids.new_zeros(shape).double(), 0)
        text = F.pad(so_far[:, 0, :, 0].long(), (0, 1), value=MASK)
        images = batch["image"].repeat_interleave(len(ids) // 5, 0)
        seen = {"image": images, "text_ids": text, "text_masks": torch.ones_like(text)}
        steps.append(text.shape)
        return self.mlm_head(padded(self, seen, True, None, "text_ids", True)[:, -1])

    type(model).caption_step = anew
    try:
        expected = written(model, given, [3, 7], 4, config)
    finally:
        type(model).caption_step = step
    assert ours == expected and len(steps) > 3 and not any(MASK in text for texts in ours for text in texts)
    assert len({tuple(texts[0]) for texts in ours}) > 1, "every image has the same caption"


@torch.no_grad()
def test_logits_of_the_cached_step_are_those_of_the_whole_text():
    model, batch = tiny_model({"captioning": 1.0}).eval(), tiny_batch()
    memory, cache = model(batch, "caption_image"), KeyValueCache(model.cached_layers, 12)
    ids = batch["text_ids"][:, :10].repeat_interleave(2, 0)  # two texts of each image, of several newest words
    ids[1::2] = ids[1::2].flip(1)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        newest = {"text_ids": ids[:, first:last], "first": first, "memory": memory, "cache": cache}
        text = F.pad(ids[:, :last], (0, 1), value=MASK)
        seen = {"image": batch["image"].repeat_interleave(2, 0), "text_ids": text, "text_masks": torch.ones_like(text)}
        expected = model.mlm_head(padded(model, seen, True, None, "text_ids", True)[:, -1])
        torch.testing.assert_close(model(newest, "caption_step"), expected, rtol=1e-9, atol=1e-10)


# ---- official files ----


@pytest.mark.parametrize("task, final_norm", [("irtr", True), ("captioning", True), ("nlvr2", True), ("vqa", False)])
def test_an_official_file_of_float16_is_read_fine_tuned_at_another_resolution_and_goes_out_as_it_is(
    tmp_path, task, final_norm
):
    source = tiny_model({"irtr": 1.0}, max_text_len=20, max_source_positions=25).half().state_dict()
    torch.save({"model": source}, tmp_path / "official.pth")
    model = tiny_model({task: 1.0}, torch.float32, image_size=48)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    heads = [name for name in own if not name.startswith("beit3.") and name not in source]
    drop = [] if task == "irtr" else ["language_head.*", "vision_head.*", "logit_scale"]
    result = hand_over(model, read_weights(tmp_path / "official.pth"), InitConfig(fresh=heads, drop=drop), "the file")
    now = model.state_dict()
    for name, value in now.items():
        if name in (IMAGE_POSITIONS, TEXT_POSITIONS):
            assert torch.equal(value[:3], source[name][:3].float())
        else:
            assert torch.equal(value, own[name] if name in heads else source[name].float()), name
    assert now[IMAGE_POSITIONS].shape == (2 + 1 + 36, 32)
    assert torch.equal(now[TEXT_POSITIONS][25:], own[TEXT_POSITIONS][25:].half().float())
    grid = now[IMAGE_POSITIONS][3:].view(6, 6, 32).mean((0, 1)) - source[IMAGE_POSITIONS][3:].float().mean(0)
    assert grid.abs().max() < 0.05  # resampled, of the same mean
    assert any("layer_norm" in line for line in result["converted"]) != final_norm
    batch = tiny_batch(dtype=torch.float32)
    batch |= {name: F.interpolate(batch[name], size=48) for name in ("image", "image_0", "image_1")}
    loss = model.train()(batch).loss
    loss.backward()
    assert loss.isfinite() and now[IMAGE_POSITIONS].shape == model.get_parameter(IMAGE_POSITIONS).grad.shape
    out = official(model.state_dict())
    assert out.keys() == {"model"} and out["model"].keys() == now.keys()
    assert all(torch.equal(out["model"][name], value) for name, value in now.items())


def test_a_file_of_another_vocabulary_is_refused():
    source = tiny_model({"irtr": 1.0}, vocab_size=60).state_dict()
    with pytest.raises(RecipeError, match=r"text_embed.weight is \[60, 32\] there and \[50, 32\] in this model"):
        hand_over(tiny_model({"irtr": 1.0}), source, InitConfig(), "a file")


def test_the_official_names():
    """Those of the recorded files, which are the reference's."""
    recorded = torch.load(golden("beit3_A.pt"), weights_only=True)["state_dict"]
    tasks = {"retrieval": {"irtr": 1.0}, **{task: {task: 1.0} for task in ALONE[1:]}}
    for name, of in tasks.items():
        assert tiny_model(of).state_dict().keys() == recorded[name].keys()
    assert isinstance(tiny_model({"nlvr2": 1.0}).head, PairClassifier)
