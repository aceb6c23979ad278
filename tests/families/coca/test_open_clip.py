"""open_clip's own code and ours: the same logits from the same folder, and every tensor there and back."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch
from families.coca.tiny import BOTH, SETTINGS, tiny_batch, tiny_model

from vlmo_ds.config import InitConfig, RecipeError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.families import FAMILIES
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.weights import from_open_clip, to_open_clip
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.interop.export import write_open_clip
from vlmo_ds.weights_file import read_weights


class Kind(type):
    """Of classes that do nothing and have every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Stub(types.ModuleType):
    """A module in which every name is such a class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Kind(name, (), {"__init__": lambda self, *args, **kwargs: None})


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip beside a torchvision that cannot be imported; of its image transforms nothing is used."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs open_clip: pip install --no-deps open_clip_torch==3.3.0")
    for name in (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.ops",
        "torchvision.ops.misc",
    ):
        stub = Stub(name)
        stub.__path__ = []
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, stub)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    yield importlib.import_module("open_clip")
    for name in [name for name in sys.modules if name.split(".")[0] in ("open_clip", "timm")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red circle above a blue square", "the star is in the middle"], 50)


@pytest.mark.parametrize("mask", ["legacy", "correct"])
@pytest.mark.parametrize("pool", ["single", "none"])
def test_open_clip_reads_the_folder_and_agrees(tmp_path, open_clip, tokenizer, mask, pool):
    model = tiny_model(class_mask=mask, attentional_pool=pool, mlp_ratio=4.0)
    write_open_clip(model.state_dict(), model.config, FAMILIES["coca"], tokenizer, tmp_path / "folder")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}", precision="fp64").double().eval()
    theirs.text.correct_cls_mask = mask == "correct"  # which no configuration of open_clip can say
    batch = tiny_batch()
    with torch.no_grad():
        found = theirs(batch["image"], batch["text_ids"])
        lengths = batch["text_masks"].sum(1)
        text = model.text(batch["text_ids"], lengths)
        image, tokens = model.visual(batch["image"])
        hidden = text.fold.padded(model.text_decoder.hidden(text.tokens_ND, text.fold, tokens))
        logits = hidden @ model.text_decoder.text_projection
    features = torch.nn.functional.normalize(text.feature, dim=-1), torch.nn.functional.normalize(image, dim=-1)
    torch.testing.assert_close(features[1], found["image_features"], rtol=1e-6, atol=1e-6)
    sure = (
        batch["text_ids"].ne(0).eq(batch["text_masks"].bool()).all(1)
    )  # texts without the word that open_clip takes for padding
    assert bool(sure.any())
    torch.testing.assert_close(features[0][sure], found["text_features"][sure], rtol=1e-6, atol=1e-6)
    valid = (batch["text_masks"].bool() & sure[:, None])[:, 1:]
    torch.testing.assert_close(
        logits[:, : valid.shape[1]][valid], found["logits"][:, : valid.shape[1]][valid], rtol=1e-6, atol=1e-6
    )


def test_open_clip_reads_a_sigmoid_models_bias(tmp_path, open_clip, tokenizer):
    model = tiny_model(itc_kind="sigmoid")
    write_open_clip(model.state_dict(), model.config, FAMILIES["coca"], tokenizer, tmp_path / "folder")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}", precision="fp64").double().eval()
    found = theirs(tiny_batch()["image"], tiny_batch()["text_ids"])
    assert float(found["logit_bias"]) == pytest.approx(float(model.logit_bias), rel=1e-6)  # the file is in float32
    assert float(found["logit_scale"]) == pytest.approx(float(model.logit_scale.exp()), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_there_and_back(tmp_path, tokenizer, kind):
    model = tiny_model(itc_kind=kind)
    write_open_clip(model.state_dict(), model.config, FAMILIES["coca"], tokenizer, tmp_path / "folder")
    weights = read_weights(tmp_path / "folder" / "open_clip_model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name
    config = json.loads((tmp_path / "folder" / "open_clip_config.json").read_text())["model_cfg"]
    assert CoCaSettings(**from_open_clip(config)) == model.config
    assert to_open_clip(CoCaSettings(**from_open_clip(config))) == to_open_clip(model.config)
    for changes, message in (
        ({"attentional_pool": "cascade"}, "attentional_pool is 'cascade', which open_clip computes otherwise"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2"),
    ):
        with pytest.raises(RecipeError, match=message):
            to_open_clip(model.config.model_copy(update=changes))
    _, note = to_open_clip(model.config.model_copy(update={"class_mask": "correct"}))
    assert "text.correct_cls_mask = True" in note


def test_a_released_file_at_another_size(tmp_path):
    """Prefixed, nested, with mask buffers of older files, for smaller images and shorter texts."""
    source = tiny_model(dtype=torch.float32)
    weights = {f"module.{name}": value for name, value in source.state_dict().items()}
    weights["module.text.attn_mask"] = torch.zeros(25, 25)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "released.pt")
    for size, length in ((64, 40), (16, 12)):
        settings = CoCaSettings(**{**SETTINGS, "vocab_size": 50, "image_size": size, "max_text_len": length})
        model = FAMILIES["coca"].build(settings, BOTH, None)
        report = hand_over(model, read_weights(tmp_path / "released.pt"), InitConfig(), "released.pt")
        assert [line.split()[0] for line in report["converted"][1:]] == [
            "visual.positional_embedding",
            "text.positional_embedding",
        ]
        ours, theirs = model.text.positional_embedding, source.text.positional_embedding
        assert torch.equal(ours[-1], theirs[-1])  # the class token's
        common = min(length, 24)
        assert torch.equal(ours[:common], theirs[:common])
        assert torch.equal(model.visual.positional_embedding[0], source.visual.positional_embedding[0])
