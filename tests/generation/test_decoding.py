"""Decoding with a cache against recomputation, and against transformers' own generate on the exported model."""

import pytest
import torch
from transformers import GenerationConfig

from vlmo_ds.config import DecodingConfig, RecipeError
from vlmo_ds.families import FAMILIES
from vlmo_ds.generation.decoding import KeyValueCache, written

WORDS, END = 20, 2
POOLS = ("single", "cascade", "parallel", "none")


def tiny(seed: int, spread: float = 1.0):
    """A random model in float64 whose next words are far from equally likely."""
    torch.manual_seed(seed)
    family = FAMILIES["coca"]
    settings = family.config(
        embed_dim=16,
        image_size=8,
        patch_size=4,
        vision_width=16,
        vision_layers=1,
        vision_head_width=8,
        attentional_pool=POOLS[seed % 4],
        pooler_queries=5,
        pooler_heads=2,
        text_width=16,
        text_layers=1 + seed % 2,
        text_heads=2,
        decoder_layers=1 + seed // 2 % 2,
        decoder_heads=4,
        max_text_len=WORDS + 1,
        vocab_size=13,
        class_mask=("legacy", "correct")[seed % 2],
    )
    model = family.build(settings, {"itc": 1.0, "caption": 2.0}, None).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.text_decoder.text_projection.mul_(spread)
    images = {"image": torch.randn(3, 3, 8, 8, dtype=torch.float64), "image_id": torch.arange(3) + 7}
    return model, images


def exported(model):
    from vlmo_ds.families.coca.huggingface import CoCaConfig, CoCaForConditionalGeneration

    ours = CoCaForConditionalGeneration(CoCaConfig(**model.config.model_dump())).double().eval()
    ours.coca.load_state_dict(model.state_dict())
    ours.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=END, pad_token_id=END)
    return ours


def cut(rows: list[list[int]]) -> list[list[int]]:
    return [row[: row.index(END)] if END in row else row for row in rows]


@torch.no_grad()
def test_cached_logits_are_those_of_a_recomputation():
    worst = 0.0
    for seed in range(100):
        model, images = tiny(seed)
        ids = torch.randint(3, 13, (3, WORDS + 1))
        memory, cache = model(images, "caption_image"), KeyValueCache(model.cached_layers, WORDS + 1)
        tokens = model.visual(images["image"])[1]
        lengths = torch.full((3,), WORDS + 1)
        text = model.text(ids, lengths, feature=False)
        hidden = text.fold.padded(model.text_decoder.hidden(text.tokens_ND, text.fold, tokens))
        whole = hidden @ model.text_decoder.text_projection
        first = 0
        for new in (3, *[1] * (WORDS - 2)):  # a prompt of three, then word by word
            given = {"text_ids": ids[:, first : first + new], "first": first, "memory": memory, "cache": cache}
            logits = model(given, "caption_step")
            first += new
            worst = max(worst, float((logits - whole[:, first - 1]).abs().max()))
    assert first == WORDS + 1
    assert worst < 1e-12


@pytest.mark.parametrize("method", ["greedy", "beam"])
@pytest.mark.parametrize("models", [12, pytest.param(100, marks=pytest.mark.long)])
def test_the_texts_are_those_of_transformers(models, method):
    config = DecodingConfig(method=method, max_length=WORDS + 1)
    lengths = set()
    for seed in range(models):
        model, images = tiny(seed)
        ours = written(model, images, [1], END, config)
        theirs = exported(model).generate(
            images["image"], max_length=WORDS + 1, num_beams=3 if method == "beam" else 1, do_sample=False
        )
        assert [row[0] for row in ours] == cut(theirs.tolist()), seed
        lengths |= {len(row[0]) for row in ours}
    assert len(lengths) > 1  # short ones and long ones


def test_options_agree_with_transformers():
    model, images = tiny(5)
    for ours, theirs in (
        ({"min_length": 9}, {"min_length": 9}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"method": "beam", "beams": 4, "length_penalty": 0.3, "num_return_sequences": 3},
         {"num_beams": 4, "length_penalty": 0.3, "num_return_sequences": 3}),
        ({"method": "beam", "min_length": 12}, {"num_beams": 3, "min_length": 12}),
    ):  # fmt: skip
        found = written(model, images, [1, 4], END, DecodingConfig(max_length=16, **ours))
        prompt = torch.tensor([[1, 4]] * 3)
        wanted = exported(model).generate(images["image"], input_ids=prompt, max_length=16, do_sample=False, **theirs)
        assert [row for rows in found for row in rows] == cut(wanted.tolist()), ours


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "beam"}, {"method": "sample", "top_p": 0.9}])
def test_the_batch_does_not_matter(settings):
    """Permuted, one by one, or all at once: every image's texts are its own."""
    if settings["method"] == "sample":
        settings = settings | {"num_return_sequences": 4, "temperature": 0.8, "top_k": 9}
    config = DecodingConfig(**settings)
    for seed in range(8):
        model, images = tiny(seed)
        whole = written(model, images, [1], END, config, seed=3)
        order = [2, 0, 1]
        again = written(model, {k: v[order] for k, v in images.items()}, [1], END, config, seed=3)
        assert again == [whole[i] for i in order]
        alone = [
            written(model, {k: v[i : i + 1] for k, v in images.items()}, [1], END, config, seed=3)[0] for i in range(3)
        ]
        assert alone == whole


def test_samples_have_the_models_frequencies():
    model, images = tiny(3)
    count = 4000
    one = {name: value[:1] for name, value in images.items()}
    config = DecodingConfig(method="sample", num_return_sequences=1000, max_length=2)
    firsts = torch.zeros(13)
    for seed in range(count // 1000):
        for text in written(model, one, [1], END, config, seed)[0]:
            firsts[text[1] if len(text) > 1 else END] += 1
    memory, cache = model(one, "caption_image"), KeyValueCache(model.cached_layers, 2)
    with torch.no_grad():
        step = {"text_ids": torch.tensor([[1]]), "first": 0, "memory": memory, "cache": cache}
        chance = model(step, "caption_step").softmax(1)[0]
    expected = chance * count
    chi_square = float(((firsts - expected) ** 2 / expected).sum())
    assert chi_square < 40  # 12 degrees of freedom: beyond once in 15,000 seeds


def test_lengths_that_do_not_fit_are_told():
    model, images = tiny(0)
    for config, prompt, message in (
        (DecodingConfig(max_length=99), [1], "max_length is 99, the model's texts have 21"),
        (DecodingConfig(min_length=30), [1], "min_length is 30, above the longest text of 21"),
        (
            DecodingConfig(max_length=3, prompt="a b"),
            [1, 4, 5],
            "prompt 'a b' has 3 words with the start, a text 3 at most",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            written(model, images, prompt, END, config)
    for settings, message in (
        ({"method": "sample", "beams": 3}, "beams is 3, which is for method 'beam', found method 'sample'"),
        ({"min_length": 9, "max_length": 5}, "min_length is 9, above max_length, which is 5"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2: method 'greedy' writes one"),
        ({"method": "beam", "num_return_sequences": 4}, "num_return_sequences is 4, above beams, which are 3"),
        ({"top_p": 0.5}, "top_p is 0.5, which is for method 'sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodingConfig(**settings)
