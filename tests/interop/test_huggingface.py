"""Exported models give the training model's numbers, in a process that has only transformers and this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from families.vlmo.tiny import JOINT, tiny_batch, tiny_model
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file, save_file

from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.evaluation.search import thumbnail
from vlmo_ds.families.vlmo.huggingface import VLMoConfig, VLMoImageProcessor, VLMoModel, exported
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.interop.export import write_official
from vlmo_ds.weights_file import read_weights

WORDS = train_tokenizer([f"is {i} a word" for i in range(30)], 50)
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
import vlmo_ds.interop.huggingface as ours
from transformers import AutoModel, AutoProcessor, AutoTokenizer
folder, name, inputs, outputs = sys.argv[1:]
model = getattr(ours, name).from_pretrained(folder) if name != "AutoModel" else AutoModel.from_pretrained(folder)
assert not model.training
with torch.no_grad():
    found = model(**load_file(inputs))
save_file({k: v.contiguous() for k, v in found.items() if v is not None}, outputs)
assert AutoProcessor.from_pretrained(folder)(text="is 3")["input_ids"].shape[0] == 1
assert AutoTokenizer.from_pretrained(folder)("is 3")["input_ids"]
assert not {"deepspeed", "webdataset", "vlmo_ds.training"} & sys.modules.keys()
print(type(model).__name__)
"""


def read_elsewhere(tmp_path, folder, name: str, inputs: dict) -> tuple[str, dict]:
    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "inputs.safetensors")
    files = [str(tmp_path / f"{part}.safetensors") for part in ("inputs", "outputs")]
    command = [sys.executable, "-c", READER, str(folder), name, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1], load_file(tmp_path / "outputs.safetensors")


@pytest.fixture(scope="module")
def batch():
    found = tiny_batch(4, dtype=torch.float32)
    return found | {"image_0": found["image"], "image_1": found["image"].flip(0)}


def words(batch) -> dict:
    return {"input_ids": batch["text_ids"], "attention_mask": batch["text_masks"]}


@pytest.mark.parametrize(
    "changes", [{}, {"use_abs_pos_emb": True, "need_relative_position_embed": False}, {"itc_kind": "sigmoid"}]
)
def test_retrieval_and_the_bare_encoder(tmp_path, batch, changes):
    model = tiny_model(JOINT, torch.float32, **changes).eval()
    exported(model.state_dict(), model.config, list(JOINT), WORDS, None, tmp_path / "out")
    inputs = {**words(batch), "pixel_values": batch["image"]}
    _, found = read_elsewhere(tmp_path, tmp_path / "out", "VLMoForImageTextRetrieval", inputs)
    with torch.no_grad():
        image, text = model(batch, "encode_image")["image"], model(batch, "encode_text")["text"]
        expected = model.logit_scale.exp() * image @ text.t() + (0 if model.logit_bias is None else model.logit_bias)
        types = model.token_types()
        pooled = model.pooled_pairs(batch["image"], batch, types)
    assert torch.allclose(found["image_embeds"], image, atol=1e-6) and torch.allclose(
        found["text_embeds"], text, atol=1e-6
    )
    assert torch.allclose(found["logits_per_image"], expected, atol=1e-5)
    name, found = read_elsewhere(tmp_path, tmp_path / "out", "AutoModel", inputs)
    assert name == "VLMoModel" and torch.allclose(found["pooler_output"], pooled, atol=1e-6)
    assert found["last_hidden_state"].shape == (4, 16 + 17, 32)


def test_pipeline_classifies_by_names(tmp_path, batch):
    from transformers import pipeline

    model = tiny_model({"irtr": 1.0}, torch.float32).eval()
    exported(model.state_dict(), model.config, ["irtr"], WORDS, None, tmp_path / "out")
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    found = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=["3", "4"], hypothesis_template="is {} a word")
    inputs = classify.tokenizer(["is 3 a word", "is 4 a word"], return_tensors="pt", padding=True)
    pixels = VLMoImageProcessor(size=32)(Image.new("RGB", (40, 30), "red"))["pixel_values"]
    texts = {"text_ids": inputs["input_ids"], "text_masks": inputs["attention_mask"]}
    with torch.no_grad():
        image, text = (model(b, f"encode_{k}")[k] for b, k in (({"image": pixels}, "image"), (texts, "text")))
        expected = (model.logit_scale.exp() * image @ text.t()).softmax(1)[0].tolist()
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        dict(zip("34", expected, strict=True)), abs=1e-5
    )


def test_questions_and_pairs(tmp_path, batch):
    model = tiny_model({"vqa": 1.0}, torch.float32, vqav2_label_size=3).eval()
    exported(model.state_dict(), model.config, ["vqa"], WORDS, ["yes", "no", "red"], tmp_path / "vqa")
    assert json.loads((tmp_path / "vqa" / "config.json").read_text())["id2label"]["2"] == "red"
    inputs = {**words(batch), "pixel_values": batch["image"]}
    _, found = read_elsewhere(tmp_path, tmp_path / "vqa", "VLMoForQuestionAnswering", inputs)
    with torch.no_grad():
        assert torch.allclose(found["logits"], model(batch, "answer"), atol=1e-6)
    model = tiny_model({"nlvr2": 1.0}, torch.float32).eval()
    exported(model.state_dict(), model.config, ["nlvr2"], WORDS, None, tmp_path / "nlvr2")
    inputs = {**words(batch), "pixel_values": torch.stack((batch["image_0"], batch["image_1"]), 1)}
    _, found = read_elsewhere(tmp_path, tmp_path / "nlvr2", "VLMoForImagesAndTextClassification", inputs)
    with torch.no_grad():
        assert torch.allclose(found["logits"], model(batch, "compare"), atol=1e-6)


def test_losses_are_the_training_ones(batch):
    from vlmo_ds.families.vlmo.huggingface import VLMoForImagesAndTextClassification, VLMoForQuestionAnswering

    model = tiny_model({"vqa": 1.0}, torch.float32, vqav2_label_size=3)
    ours = VLMoForQuestionAnswering(VLMoConfig(tasks=["vqa"], **model.config.model_dump()))
    ours.vlmo.load_state_dict(model.state_dict())
    targets = torch.rand(4, 3)
    loss = ours(batch["text_ids"], batch["image"], batch["text_masks"], labels=targets).loss
    assert float(loss) == pytest.approx(float(model({**batch, "vqa_targets": targets}).loss), rel=1e-6)
    rows, answers = torch.tensor([0, 0, 1, 1]), {"vqa_targets": targets}
    once = model({**batch, "image": batch["image"][:2], "question_image": rows, **answers}).loss
    each = model({**batch, "image": batch["image"][rows], **answers}).loss
    assert float(once) == pytest.approx(float(each), rel=1e-6)
    model = tiny_model({"nlvr2": 1.0}, torch.float32)
    ours = VLMoForImagesAndTextClassification(VLMoConfig(tasks=["nlvr2"], **model.config.model_dump()))
    ours.vlmo.load_state_dict(model.state_dict())
    answers = torch.tensor([0, 1, 1, 0])
    pixels = torch.stack((batch["image_0"], batch["image_1"]), 1)
    loss = ours(batch["text_ids"], pixels, batch["text_masks"], labels=answers).loss
    assert float(loss) == pytest.approx(float(model({**batch, "answers": answers}).loss), rel=1e-6)
    with pytest.raises(ValueError, match=r"pixel_values has shape \[4, 3, 32, 32\]; accepted"):
        ours(batch["text_ids"], batch["image"])


def test_one_modality_alone(batch):
    model = tiny_model({"irtr": 1.0}, torch.float32).eval()
    ours = VLMoModel(VLMoConfig(**model.config.model_dump())).eval()
    ours.vlmo.load_state_dict({k: v for k, v in model.state_dict().items() if k in ours.vlmo.state_dict()})
    with torch.no_grad():
        text, image = ours(**words(batch)).last_hidden_state, ours(pixel_values=batch["image"]).last_hidden_state
        assert text.shape == (4, 16, 32) and image.shape == (4, 17, 32)
        feature = model.itc_image_proj(image[:, 0])
        assert torch.allclose(feature, model(batch, "encode_image")["image"], atol=1e-6)
    with pytest.raises(ValueError, match="needs input_ids, pixel_values or both"):
        ours()


def test_images_are_read_from_files_bytes_arrays_and_pillow(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    processor = VLMoImageProcessor(size=32)
    kinds = [str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), Image.fromarray(array), array]
    values = processor(kinds)["pixel_values"]
    assert values.shape == (4, 3, 32, 32) and values.min() >= -1 and values.max() <= 1
    assert all(torch.equal(value, values[0]) for value in values)
    assert processor([[array, array]] * 3)["pixel_values"].shape == (3, 2, 3, 32, 32)


@pytest.mark.parametrize("turned", range(1, 9))
def test_photos_are_turned_upright(tmp_path, turned):
    array = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    image.getexif()[ExifTags.Base.Orientation] = turned
    image.save(tmp_path / "x.png", exif=image.getexif())
    upright = ImageOps.exif_transpose(image)
    assert (turned == 1) == np.array_equal(upright, array)
    values = VLMoImageProcessor(size=32)([tmp_path / "x.png", image, upright])["pixel_values"]
    assert torch.allclose(values[1], values[2])
    assert (values[0] - values[2]).abs().mean() < 1 / 127.5  # turned after resizing, whose two passes round


@pytest.mark.parametrize("byte, value", [(11, 0), (37, 1)])  # the type of a field before, and of one behind
def test_what_else_a_camera_wrote_may_be_broken(tmp_path, byte, value):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.DateTime] = "Maker", "2020:01:01"
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.0
    image.save(tmp_path / "x.jpg", exif=exif)
    broken = bytearray((tmp_path / "x.jpg").read_bytes())
    broken[broken.index(b"Exif\0\0") + 6 + byte] = value
    (tmp_path / "x.jpg").write_bytes(broken)
    processor = VLMoImageProcessor(size=32)
    with Image.open(tmp_path / "x.jpg") as photo:
        expected = processor(np.rot90(np.array(photo), -1))["pixel_values"]
        values = processor([tmp_path / "x.jpg", photo])["pixel_values"]
    assert (values - expected).abs().mean() < 4 / 127.5  # two decoders, and turned before or after resizing
    upright = np.array(thumbnail(tmp_path / "x.jpg"))
    assert (upright[0] == 255).all() and (upright[:, 0] != 255).any()  # white above and below: wider than high


def test_official_names_and_back(tmp_path, batch):
    model = tiny_model(JOINT, torch.float32).eval()
    write_official({"state_dict": model.state_dict()}, tmp_path / "official.pt")
    again = VLMo(model.config, JOINT).eval()
    again.load_state_dict(read_weights(tmp_path / "official.pt"))
    with torch.no_grad():
        assert torch.equal(again(batch, "match"), model(batch, "match"))
    write_official({"state_dict": model.state_dict()}, tmp_path / "half.pt", half=True)
    assert read_weights(tmp_path / "half.pt")["pooler.dense.weight"].dtype == torch.float16
