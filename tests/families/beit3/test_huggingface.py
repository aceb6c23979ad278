"""Exported folders, read by the Auto classes: what the model gives."""

import pytest
import torch
from families.beit3.tiny import tiny_batch, tiny_model
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from vlmo_ds.config import RecipeError
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.families.beit3 import huggingface


def export(folder, tasks, **changes):
    """(our model, transformers' that the folder says it is)."""
    tokenizer = train_tokenizer(["a red ball lies on a small box", "two green stones beside a wall"], 50)
    model = tiny_model(dict.fromkeys(tasks, 1.0), torch.float32, **changes).eval()
    answers = [f"answer {i}" for i in range(6)] if "vqa" in tasks else None
    kind = type(huggingface.exported(model.state_dict(), model.config, tasks, tokenizer, answers, folder))
    return model, kind.from_pretrained(folder).eval()


@torch.no_grad()
def test_retrieval(tmp_path):
    model, theirs = export(tmp_path / "m", ["itc", "itm", "mvlm"])
    batch = tiny_batch(dtype=torch.float32)
    inputs = {"input_ids": batch["text_ids"], "attention_mask": batch["text_masks"], "pixel_values": batch["image"]}
    out = theirs(**inputs)
    torch.testing.assert_close(out.image_embeds, model.encode_image(batch)["image"], rtol=0, atol=0)
    torch.testing.assert_close(out.text_embeds, model.encode_text(batch)["text"], rtol=0, atol=0)
    torch.testing.assert_close(theirs.match(**inputs), model.match(batch), rtol=0, atol=0)
    auto = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(auto(**inputs).logits_per_text, out.logits_per_text, rtol=0, atol=0)
    encoded = AutoModel.from_pretrained(tmp_path / "m").eval()(**inputs).last_hidden_state
    pair = model.class_of_pairs(batch)
    assert encoded.shape == (5, 17 + 16, 32)
    torch.testing.assert_close(encoded[:, 0], pair, rtol=1e-5, atol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    assert processor.image_processor.size == 32 and processor(text="a red ball")["input_ids"].shape[0] == 1


@torch.no_grad()
@pytest.mark.parametrize("task, call", [("vqa", "answer"), ("nlvr2", "compare")])
def test_classifiers(tmp_path, task, call):
    model, theirs = export(tmp_path / "m", [task])
    batch = tiny_batch(dtype=torch.float32)
    images = torch.stack((batch["image_0"], batch["image_1"]), 1) if task == "nlvr2" else batch["image"]
    labels = batch["answers"] if task == "nlvr2" else batch["vqa_targets"]
    out = theirs(batch["text_ids"], images, batch["text_masks"], labels)
    torch.testing.assert_close(out.logits, model(batch, call), rtol=0, atol=0)
    torch.testing.assert_close(out.loss, model(batch).losses[task])
    assert task != "vqa" or theirs.config.id2label[3] == "answer 3"


@torch.no_grad()
def test_images_alone(tmp_path):
    model, theirs = export(tmp_path / "m", ["classification"], num_classes=6, label_smoothing=0.0)
    batch = tiny_batch(dtype=torch.float32)
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    assert type(auto) is type(theirs) and auto.config.num_labels == 6
    out = auto(batch["image"], batch["label"])
    torch.testing.assert_close(out.logits, model.classify(batch), rtol=0, atol=0)
    torch.testing.assert_close(out.loss, model(batch).losses["classification"])


def test_a_model_that_writes_captions_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no transformers class of a BEiT-3 that writes captions"):
        export(tmp_path / "m", ["captioning"])
