"""The visual tokenizer: its codebook's start, moves and replacements; teachers; weights of other origins."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from families.vqkd.tiny import tiny_batch, tiny_model

from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.outside import opened_teacher, resampled
from vlmo_ds.interop.parity import main as parity
from vlmo_ds.objectives.quantize import kmeans, moved, nearest, perplexity, places_of


@pytest.mark.parametrize("name", ["vqkd_A.pt", "beit2_mim_A.pt"])
def test_recorded_numbers(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["parity", str(golden(name))])
    assert parity() in (0, None)
    assert "passed" in capsys.readouterr().out


def test_kmeans_finds_what_lies_apart():
    torch.manual_seed(0)
    centres = torch.eye(8, dtype=torch.float64)[:5]
    which = torch.cat((torch.arange(5), torch.arange(5).repeat(40)))  # it begins with the first
    vectors = F.normalize(centres[which] + 0.05 * torch.randn(len(which), 8, dtype=torch.float64), dim=1)
    codebook, counts = kmeans(vectors, 5)
    assert counts.tolist() == [41.0] * 5
    assert float((codebook * centres).sum(1).min()) > 0.995
    assert torch.equal(nearest(vectors, codebook), which)


def test_perplexity_is_the_number_of_codes_that_are_used_alike():
    assert float(perplexity(torch.tensor([3.0, 3.0, 0.0, 3.0]))) == pytest.approx(3)
    assert float(perplexity(torch.tensor([7.0, 0.0]))) == pytest.approx(1)


def test_the_codebook_moves_by_all_micro_batches_of_a_step_together():
    """Two halves settled together are the whole; and what is left out of a step leaves no trace."""
    model, batch = tiny_model().train(), tiny_batch(6)
    before = model.quantize.embedding.weight.clone()
    whole = model(batch)
    halves = [model({name: value[part] for name, value in batch.items()}) for part in (slice(0, 2), slice(2, 6))]
    metrics = model.settle([whole.seen], taken=False)
    assert torch.equal(model.quantize.embedding.weight, before)
    expected = moved(before, whole.seen["counts"], whole.seen["sums"], 0.8)
    assert model.settle([half.seen for half in halves], taken=True) == pytest.approx(
        {**metrics, "vqkd/dead_codes": pytest.approx(0, abs=12)}
    )
    torch.testing.assert_close(model.quantize.embedding.weight, expected.to(before.dtype))
    assert not torch.equal(expected, before)
    torch.testing.assert_close(model.quantize.cluster_size, 0.2 * whole.seen["counts"].to(before.dtype))
    assert not model.eval()(batch).seen  # measuring sees nothing


def test_metrics_are_of_the_step():
    model = tiny_model().train()
    seen = {"counts": torch.tensor([4.0, 4.0] + [0.0] * 10).double(), "sums": torch.zeros(12, 6).double()}
    metrics = model.settle([seen], taken=True)
    assert metrics["vqkd/code_use"] == pytest.approx(2 / 12) and metrics["vqkd/perplexity"] == pytest.approx(2)
    assert metrics["vqkd/dead_codes"] == 10


def test_dead_codes_take_places_of_the_batch():
    model, batch = tiny_model(replace_below=0.5).train(), tiny_batch(5)
    model.quantize.cluster_size[:] = torch.tensor([9.0] * 8 + [0.01] * 4)
    dead = model.quantize.embedding.weight[8:].clone()
    seen = model(batch).seen
    used = seen["counts"][8:] > 0
    seen["counts"][8:], seen["sums"][8:] = 0, 0
    model.settle([seen], taken=True)
    now = model.quantize.embedding.weight[8:]
    vectors = model.encode(model.pixels(batch)).rows_NC
    assert float((now @ vectors.T).max(1).values.min()) == pytest.approx(1) and not torch.equal(now, dead), used
    assert float(model.quantize.cluster_size.min()) > 1
    assert tiny_model().train()(batch).seen.keys() == {"counts", "sums"}  # the reference's way sees no vectors


def test_the_start_does_not_depend_on_how_a_batch_is_cut():
    batch = tiny_batch(8)
    found = []
    for cut in ([8], [3, 5]):
        model = tiny_model(teacher_norm="standard").train()
        assert model.looks_ahead
        parts = [{name: value[rows] for name, value in batch.items()} for rows in torch.arange(8).split(cut)]
        assert model.keys_of_step([model(part, "keys") for part in parts]) == {}
        assert not model.looks_ahead
        found.append(model)
    one, other = found
    torch.testing.assert_close(one.quantize.embedding.weight, other.quantize.embedding.weight)
    torch.testing.assert_close(one.teacher_mean, other.teacher_mean)
    told = one.features(batch).flatten(0, 1)
    torch.testing.assert_close(told.mean(0), torch.zeros(32).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(told.std(0, correction=0), torch.ones(32).double())
    assert float(one.quantize.cluster_size.sum()) == 8 * 16


def test_mean_and_variance_of_a_teacher_are_taken_for_a_codebook_that_is_there():
    batch = tiny_batch(8)
    model = tiny_model(teacher_norm="standard").train()
    with torch.no_grad():
        model.quantize.embedding.initted.fill_(1)
    codebook = model.quantize.embedding.weight.clone()
    assert model.looks_ahead
    model.keys_of_step([model(batch, "keys")])
    assert not model.looks_ahead and torch.equal(model.quantize.embedding.weight, codebook)
    torch.testing.assert_close(model.features(batch).flatten(0, 1).mean(0), torch.zeros(32).double(), atol=1e-9, rtol=0)


def test_components_that_do_not_vary_are_not_blown_up():
    model, batch = tiny_model(teacher_norm="standard").train(), tiny_batch(8)
    batch["teacher_features"][..., 0] = 1 + 1e-9 * batch["teacher_features"][..., 0]
    model.keys_of_step([model(batch, "keys")])
    told = model.features(batch)
    assert float(told[..., 0].abs().max()) < 1e-4 and float(told[..., 1].std()) == pytest.approx(1, rel=1e-2)


def test_an_order_of_patches_is_that_of_their_samples():
    ids = torch.tensor([7, 3, 9])
    assert torch.equal(places_of(ids, 4).view(3, 4)[1], places_of(ids[1:2], 4))
    assert len(set(places_of(torch.arange(50), 9).tolist())) == 450


def test_pictures_of_bytes_are_resampled_by_way_of_floats(monkeypatch):
    """GPUs resample no bytes."""
    interpolate, kinds = F.interpolate, []
    monkeypatch.setattr(F, "interpolate", lambda x, **how: kinds.append(x.dtype) or interpolate(x, **how))
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found, exact = resampled(picture, 24), resampled(picture.double(), 24)
    assert set(kinds) == {torch.float32, torch.float64} and found.dtype == torch.uint8 and found.shape == (2, 3, 24, 24)
    assert float((found - exact.clamp(0, 255)).abs().max()) <= 0.501
    assert resampled(picture, 32) is picture


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
def test_teachers_of_transformers_give_their_patches_features(tmp_path, kind):
    import transformers

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    if kind == "clip":
        text = {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 50,
        }
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=20)
        )
    elif kind == "siglip":
        text = {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 50,
        }
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=sizes))
    elif kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**sizes))
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.eval().save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixel_values = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        if kind == "clip":
            tokens = model.vision_model(pixel_values).last_hidden_state
            expected = model.visual_projection(model.vision_model.post_layernorm(tokens))[:, 1:]
        elif kind == "siglip":
            expected = model.vision_model(pixel_values).last_hidden_state
        else:
            expected = model(pixel_values).last_hidden_state[:, 1:]
    width = 20 if kind == "clip" else 24
    teacher = opened_teacher(str(tmp_path), 4, width)
    torch.testing.assert_close(teacher(image, torch.float32), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match=f"features of width {width}, and model.teacher_dim is 7: take {width}"):
        opened_teacher(str(tmp_path), 4, 7)
    with pytest.raises(RecipeError, match=r"speaks of 4 x 4 patches of an image, the model has 2 x 2"):
        opened_teacher(str(tmp_path), 2, width)


def test_a_teacher_that_is_none_is_told_in_a_line(tmp_path):
    with pytest.raises(
        RecipeError, match=r"^model.teacher: \S+ is no finished run of this project, and cannot be opened"
    ) as told:
        opened_teacher(str(tmp_path / "nothing"), 4, 24)
    assert "\n" not in str(told.value)


def test_official_files_load_without_their_teacher_and_at_another_size():
    model = tiny_model(torch.float32)
    file = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    file |= {"teacher_model.conv1.weight": torch.zeros(3), "scaling_layer_for_teacher.shift": torch.zeros(3)}
    same = tiny_model(torch.float32)
    report = hand_over(same, file, InitConfig(), "a file")
    assert report["converted"] == ["2 tensors of a teacher left out"] and not report["fresh"]
    torch.testing.assert_close(
        dict(same.state_dict()), {n: v for n, v in model.state_dict().items()}, rtol=1e-3, atol=1e-3
    )
    larger = tiny_model(torch.float32, image_size=48)
    report = hand_over(larger, file, InitConfig(), "a file")
    assert [line.split(":")[0] for line in report["converted"][1:]] == [
        "encoder.pos_embed [1, 17, 32] -> [1, 37, 32]",
        "decoder.pos_embed [1, 17, 32] -> [1, 37, 32]",
    ]
    assert model.family.weights().official(model.state_dict())["model"].keys() == model.state_dict().keys()
