"""The exported folders in transformers' own BLIP classes: logits, losses, captions."""

import pytest
import torch
from families.blip.tiny import ALL, tiny_batch, tiny_model
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor

from vlmo_ds.config import DecodingConfig
from vlmo_ds.data.tokenizer import train_tokenizer
from vlmo_ds.families.blip.huggingface import exported
from vlmo_ds.families.blip.model import begun_with
from vlmo_ds.generation.decoding import written

WORDS = ["a red ball lies on a small box", "two green stones beside a wall", "no large thing is here"]


def export(folder, tasks, **changes):
    """(our model, the folder, the tokenizer) of random weights."""
    tokenizer = train_tokenizer(WORDS, 60)
    model = tiny_model(ALL, vocab_size=len(tokenizer) + 2, **changes).eval()
    exported(model.state_dict(), model.config, tasks, tokenizer, None, folder)
    return model, tokenizer


def test_writing(tmp_path):
    model, tokenizer = export(tmp_path / "m", ["itc", "itm", "lm"])
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "m").double().eval()
    batch = tiny_batch()
    batch["text_ids"] = batch["text_ids"] % len(tokenizer)
    lengths, images = batch["text_masks"].sum(1), batch["image"]
    ours = model.written(batch["text_ids"], lengths, model.visual_encoder(images))
    ids = begun_with(model.config.decode_word, batch["text_ids"])
    labels = ids.masked_fill(batch["text_masks"] == 0, -100)
    with torch.no_grad():
        out = theirs(pixel_values=images, input_ids=ids, attention_mask=batch["text_masks"], labels=labels)
    torch.testing.assert_close(ours, out.logits[:, :-1][batch["text_masks"][:, 1:].bool()], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(batch).losses["lm"], out.loss, rtol=1e-6, atol=1e-6)
    assert BlipProcessor.from_pretrained(tmp_path / "m").image_processor.size["height"] == 32


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_its_generate(tmp_path, beams):
    model, tokenizer = export(tmp_path / "m", ["lm"])
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "m").double().eval()
    batch = tiny_batch()
    start, *_, end = tokenizer("")["input_ids"]
    method = {"method": "beam", "beams": beams} if beams > 1 else {}
    with torch.no_grad():
        ours = written(model, batch, [start], end, DecodingConfig(max_length=20, **method))
        ids = theirs.generate(
            batch["image"], num_beams=beams, do_sample=False, max_length=20, use_cache=False,
            suppress_tokens=[model.config.decode_word, model.config.encode_word],
        )  # fmt: skip
    for texts, row in zip(ours, ids.tolist(), strict=True):
        assert texts[0][1:] == row[1 : len(texts[0])]
        assert all(word in (end, tokenizer.pad_token_id) for word in row[len(texts[0]) :])


def test_comparing_and_matching(tmp_path):
    model, tokenizer = export(tmp_path / "m", ["itc", "itm"])
    theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "m").double().eval()
    batch = tiny_batch()
    batch["text_ids"] = batch["text_ids"] % len(tokenizer)
    given = {"pixel_values": batch["image"], "attention_mask": batch["text_masks"]}
    ids = begun_with(model.config.encode_word, batch["text_ids"])
    with torch.no_grad():
        logits = theirs(input_ids=ids, use_itm_head=True, **given).itm_score
        cosines = theirs(input_ids=batch["text_ids"], use_itm_head=False, **given).itm_score
        ours = model.encode_image(batch)["image"] @ model.encode_text(batch)["text"].t()
        torch.testing.assert_close(model.match(batch), logits[:, 1] - logits[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, cosines, rtol=1e-6, atol=1e-6)
