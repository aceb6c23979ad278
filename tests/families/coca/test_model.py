"""CoCa's model: recorded numbers, padding, what each task reaches, gradients in parts."""

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from families.coca.tiny import BOTH, tiny_batch, tiny_model

from vlmo_ds.config import RecipeError
from vlmo_ds.families import FAMILIES
from vlmo_ds.families.coca.block import Block
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.model import next_words
from vlmo_ds.families.coca.parity import compare
from vlmo_ds.families.step import StepOutput
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.gradient_cache import cached_contrast

POOLS = ("single", "cascade", "parallel", "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_numbers(dtype):
    recorded = torch.load(golden("coca_A.pt"), weights_only=True)
    found = list(compare(recorded, dtype))
    assert len(found) > 100
    assert not [(name, difference) for name, difference, bar in found if difference > bar]


@pytest.mark.parametrize("arch, words, millions", [
    ("coca_ViT-B-32", 49408, 253.56), ("coca_ViT-L-14", 49408, 638.45), ("coca_base", 64000, 440.34),
])  # fmt: skip
def test_published_sizes(arch, words, millions):
    family = FAMILIES["coca"]
    with torch.device("meta"):
        model = family.build(family.config(arch=arch, vocab_size=words), BOTH, None)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("mask", ["legacy", "correct"])
@pytest.mark.parametrize("pool", POOLS)
def test_trimmed_texts_give_what_padded_ones_do(mask, pool):
    """A batch as long as the context, and each text alone, cut to its words: features, next words' logits, losses."""
    model = tiny_model(class_mask=mask, attentional_pool=pool)
    batch = tiny_batch()
    lengths = batch["text_masks"].sum(1)
    whole = model.text(batch["text_ids"], lengths)
    _, tokens = model.visual(batch["image"])
    whole_hidden = whole.fold.padded(model.text_decoder.hidden(whole.tokens_ND, whole.fold, tokens))
    for row, length in enumerate(lengths.tolist()):
        alone = model.text(batch["text_ids"][row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone.feature[0], whole.feature[row], rtol=1e-9, atol=1e-9)
        hidden = model.text_decoder.hidden(alone.tokens_ND, alone.fold, tokens[row : row + 1])
        torch.testing.assert_close(hidden, whole_hidden[row, :length], rtol=1e-9, atol=1e-9)


def test_cross_attention_keeps_nothing_of_its_context():
    """A context of a thousand tokens leaves no more for the backward pass than one of ten."""
    torch.manual_seed(0)
    block = Block(8, 2, 2.0, cross=True)
    block.reset_parameters(1)
    kept = []
    for tokens in (10, 1000):
        context, sizes = torch.randn(3, tokens, 8, requires_grad=True), []

        def pack(tensor, context=context, sizes=sizes):
            if tensor.data_ptr() != context.data_ptr():
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = block(torch.randn(3, 4, 8, requires_grad=True), context)
        out.square().sum().backward()
        assert context.grad.abs().sum() > 0
        kept.append(sum(sizes))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("mask", ["legacy", "correct"])
def test_what_the_class_token_sees(mask):
    """Its words, and nothing after them but, with the released models' mask, the padding word in the next place."""
    model = tiny_model(class_mask=mask)
    ids, lengths = torch.tensor([[3, 7, 9, 4]]), torch.tensor([4])
    feature = model.text(ids, lengths).feature
    behind = model.text(torch.tensor([[3, 7, 9, 4, 11, 12]]), lengths).feature
    assert torch.equal(feature, behind)
    with torch.no_grad():
        model.text.token_embedding.weight[0] += 1.0  # the padding word's
    assert torch.equal(model.text(ids, lengths).feature, feature) == (mask == "correct")
    without = model.text(ids, lengths, feature=False)
    torch.testing.assert_close(without.tokens_ND, model.text(ids, lengths).tokens_ND)


@pytest.mark.parametrize("tasks", [{"itc": 1.0}, {"caption": 2.0}, BOTH])
@pytest.mark.parametrize("pool", POOLS)
def test_a_stage_trains_exactly_what_its_loss_reaches(tasks, pool):
    from vlmo_ds.training.optim import set_trainable

    model = tiny_model(tasks, attentional_pool=pool)
    stage = parse_recipe({
        "model": {"family": "coca"},
        "stages": [{"name": "a", "tasks": tasks, "data": {"shards": ["x"]}, "global_batch_size": 4, "steps": 2}],
    }, "here").stages[0]  # fmt: skip
    trained = set_trainable(model, stage)
    for parameter in model.parameters():
        parameter.requires_grad_()
    model(tiny_batch()).loss.backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())]
    assert trained == reached
    assert tasks == BOTH or len(trained) < len(list(model.parameters()))


def test_no_weight_starts_as_it_lay_in_memory():
    """Everything is drawn or set: two models of the same seed are equal, and no number is out of the usual."""
    settings = tiny_model().config
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(FAMILIES["coca"].build(settings, BOTH, None))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name
        assert float(one.abs().max()) < 6, name
        if not name.endswith("bias"):
            assert float(one.abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_several_positives_and_the_sigmoid_loss_written_out(kind):
    """Of 6 pairs two show one picture, and two others have one caption."""
    model, batch = tiny_model(itc_kind=kind, positives="image"), tiny_batch(6)
    batch["image_id"] = torch.tensor([0, 1, 2, 3, 4, 2])
    for name in ("text_ids", "text_masks"):
        batch[name][3] = batch[name][1]
    together = torch.eye(6, dtype=torch.bool)
    for one, other in ((2, 5), (1, 3)):
        together[one, other] = together[other, one] = True
    found = model(batch, "contrast_features")
    logits = found["image"] @ found["text"].T * model.logit_scale.exp()
    if kind == "sigmoid":
        wanted = -F.logsigmoid(torch.where(together, 1, -1) * (logits + model.logit_bias)).sum() / 6
    else:
        share = together / together.sum(1, keepdim=True)
        wanted = -((logits.log_softmax(1) + logits.T.log_softmax(1)) * share).sum() / 12
    out = model(batch)
    assert float(out.losses["itc"]) == pytest.approx(float(wanted), rel=1e-12)
    parameters = [parameter for name, parameter in model.named_parameters() if name in ("logit_scale", "logit_bias")]
    ours = torch.autograd.grad(out.losses["itc"], parameters)
    for one, other in zip(ours, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    assert len(parameters) == (2 if kind == "sigmoid" else 1)


@pytest.mark.parametrize("parts, changes", [(2, {}), (4, {}), (2, {"itc_kind": "sigmoid", "positives": "image"})])
def test_gradients_in_parts_are_those_of_the_whole_batch(parts, changes):
    model, batch = tiny_model(**changes), tiny_batch(8)
    batch["image_id"] = torch.arange(8) // 2
    out = model(batch)
    out.loss.backward()
    direct = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pieces = [{k: v[i::parts] for k, v in batch.items()} for i in range(parts)]
    cached = cached_contrast(
        model, parts, lambda i, name, also: model({**pieces[i], **also}, name), torch.Tensor.backward
    )
    assert float(cached.loss) == pytest.approx(float(out.loss), rel=1e-9)
    for name, value in out.values.items():
        assert float(cached.values[name]) == pytest.approx(float(value), rel=1e-9), name
    assert float(cached.ratios["caption/accuracy"][1]) == float(out.ratios["caption/accuracy"][1])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, direct[name], rtol=1e-7, atol=1e-10)


def test_the_caption_loss_is_that_of_whole_logits():
    from vlmo_ds.objectives import captioning

    torch.manual_seed(0)
    hidden, head = torch.randn(70, 8).double().requires_grad_(), torch.randn(8, 30).double().requires_grad_()
    labels = torch.randint(30, (70,))
    torch.nn.functional.cross_entropy(hidden @ head, labels, reduction="sum").backward()
    wanted = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    captioning.CHUNK, before = 16, captioning.CHUNK
    try:
        captioning.word_losses(hidden, head, labels)[0].backward()
    finally:
        captioning.CHUNK = before
    for ours, theirs in zip((hidden.grad, head.grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_recomputation_changes_nothing():
    batch = tiny_batch()
    found = []
    for recompute in ("none", "cheap", "blocks", 2):
        model = tiny_model(recompute=recompute).train()
        model(batch).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("changes, message", [
    ({"text_width": 96}, "text_width is 96 and embed_dim 192"),
    ({"vision_head_width": 50}, "vision_head_width is 50, which does not divide vision_width 192"),
    ({"pooler_queries": 1}, "pooler_queries is 1"),
    ({"position_init": "sincos", "vision_width": 50, "vision_head_width": 25}, "vision_width 50 is not a multiple of 4"),
    ({"decoder_heads": 5}, "decoder_heads is 5, which does not divide text_width 192"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        CoCaSettings(**changes)


def test_captions_need_texts():
    data = {"shards": ["x"], "image_only": True}
    stage = {"name": "a", "tasks": {"caption": 1}, "data": data, "global_batch_size": 4, "steps": 2}
    with pytest.raises(RecipeError, match="data.image_only is true, which fits no task of coca, found"):
        parse_recipe({"model": {"family": "coca"}, "stages": [stage]}, "here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_of_many_parts_are_counted_exactly(dtype):
    """A count in 16 bits stops growing at 256 times the part, or overflows."""
    model, batch = tiny_model(dtype=torch.float32).to(dtype), tiny_batch(5, dtype=torch.float32)
    words = int((batch["text_masks"].sum(1) - 1).sum())
    counted = sum(model(batch, "contrast_features")["words_count"] for _ in range(1000))
    assert int(counted) == 1000 * words


def test_a_stage_that_trains_nothing_is_told():
    from vlmo_ds.training.optim import set_trainable

    stage = {"name": "a", "tasks": {"itc": 1}, "data": {"shards": ["x"]}, "global_batch_size": 4, "steps": 2}
    stage["trainable"] = ["text_decoder.*"]
    parsed = parse_recipe({"model": {"family": "coca"}, "stages": [stage]}, "here").stages[0]
    with pytest.raises(RecipeError, match="stages.a: nothing is trained: itc reaches none of what trainable names"):
        set_trainable(tiny_model({"itc": 1.0}), parsed)


def test_only_contrast_has_features_to_cache():
    stage = {"name": "a", "tasks": {"caption": 1}, "data": {"shards": ["x"]}, "global_batch_size": 4, "steps": 2}
    with pytest.raises(RecipeError, match="gradient_cache is for a stage with the task itc, with caption beside it"):
        parse_recipe(
            {"model": {"family": "coca"}, "stages": [stage | {"gradient_cache": True, "micro_batch_size": 2}]}, "here"
        )


def test_one_step_writes_its_losses():
    out = tiny_model()(tiny_batch())
    assert isinstance(out, StepOutput)
    assert float(out.loss) == pytest.approx(float(out.values["loss/itc"] + 2 * out.values["loss/caption"]))


def test_the_words_of_a_prompt_are_not_learned():
    model, batch = tiny_model(), tiny_batch(5)
    prompt_B = torch.tensor([1, 2, 3, 4, 9])
    lengths = batch["text_masks"].sum(1)
    _, tokens = model.visual(model.pixels(batch), feature=True)
    x_ND, fold, labels_N = next_words(batch["text_ids"], lengths, model.text(batch["text_ids"], lengths, feature=True))
    logits_N = model.text_decoder.hidden(x_ND, fold, tokens) @ model.text_decoder.text_projection
    kept = torch.cat([torch.arange(1, length) >= prompt for length, prompt in zip(lengths, prompt_B, strict=True)])
    expected = torch.nn.functional.cross_entropy(logits_N[kept], labels_N[kept])
    found = model({**batch, "prompt_words": prompt_B}).values["loss/caption"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)
    assert int(model({**batch, "prompt_words": prompt_B}, "contrast_features")["words_count"]) == kept.sum() < len(kept)
