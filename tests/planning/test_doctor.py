"""The doctor finds what is wrong with data and settings, and nothing where nothing is."""

import io
import json
import tarfile

import numpy as np
from conftest import call, tiny_recipe, write_yaml
from PIL import Image

from vlmo_ds.families import FAMILIES
from vlmo_ds.planning.doctor import Learnt, about_images, about_settings, about_texts


class Words:
    """A tokenizer by spaces; of words that it does not know, one piece a letter."""

    unk_token_id = 1

    def __init__(self, *known):
        self.known = known

    def __call__(self, texts, **_):
        def pieces(text):
            return [
                n for word in text.split() for n in ([2] if not self.known or word in self.known else [1] * len(word))
            ]

        return {"input_ids": [[0, *pieces(text), 3] for text in texts]}


def png(*colours, size=64, seed=None):
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[:] = colours or np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_captions():
    fine = [f"a dog number {i} on a hill" for i in range(40)]
    assert about_texts(fine, Words(), 20) == []
    (words,) = about_texts([*fine, *["image"] * 10], Words(), 20)
    assert words.startswith("20% of the captions are 'image': contrast takes its copies for wrong ones")
    (words,) = about_texts(fine, Words(), 6)
    assert words == "100% of the captions are longer than max_text_len 6 and lose their ends"
    cut, unknown = about_texts([f"Hund{i} Wiese{i} springt" for i in range(40)], Words("dog"), 99)
    assert "cuts a word into 6." in cut and "100% of the word pieces are unknown" in unknown


def test_pictures():
    rng = np.random.default_rng(0)
    fine = [png(*rng.integers(0, 256, 3), seed=i) for i in range(20)]
    mixed = [np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(20)]

    def encoded(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    mixed = [encoded(pixels) for pixels in mixed]
    assert about_images(mixed, 64) == []
    (words,) = about_images(mixed, 224)
    assert words == "100% of the pictures have less than half of image_size 224 on a side"
    assert about_images(mixed[:10] * 2, 64) == ["50% of the pictures are copies of others, byte by byte"]
    (words,) = about_images(fine, 64)
    assert words == "100% of the pictures show one colour"
    alike = [mixed[0] + bytes([i]) for i in range(20)]  # the same picture, other bytes
    assert about_images(alike, 64) == ["the pictures all look alike: there is little to tell them apart by"]


def test_settings():
    def found(tasks=("itc",), **changes):
        stage = {
            "name": "a",
            "tasks": dict.fromkeys(tasks),
            "data": {"shards": ["-"]},
            "global_batch_size": 256,
            "steps": 10,
        }
        return about_settings(FAMILIES["vlmo"].stage(**stage | changes))

    assert found() == []
    assert found(optimizer={"lr": 0.5}) == ["optimizer.lr is 0.5; usual with AdamW are 1e-06 to 0.003"]
    (words,) = found(micro_batch_size=8)
    assert words.startswith("contrast has 8 candidates a rank in each forward pass, fewer than 16")
    assert found(micro_batch_size=8, gradient_cache=True) == [] and found(("textmlm",), micro_batch_size=8) == []
    assert found(schedule={"warmup_steps": 0}, init={"weights": "fresh"}) == [
        "schedule.warmup_steps is 0: fresh weights want a warm-up"
    ]


def test_what_was_learnt():
    assert Learnt("itc", 2.0, 0.1, 50).fault == "" and Learnt("itc", 2.0, 1.9, 3).fault == ""
    assert "does not fall on one batch" in Learnt("itc", 2.0, 1.9, 100).fault
    assert "is no number" in Learnt("itc", 2.0, float("nan"), 3).fault


def test_a_run_that_is_well_and_one_that_is_not(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic)
    for stage in recipe["stages"]:
        stage |= {"global_batch_size": 32}
    file = write_yaml(tmp_path / "recipe.yaml", recipe)
    joint = ["--recipe", file, "--stages", "joint", "--seconds", "200"]  # enough beside other work
    done = call("vlmo_ds.planning.doctor", *joint, "stages.joint.optimizer.lr=0.003")
    assert "nothing found that is wrong" in done.stdout and "joint: itc: 2." in done.stdout
    done = call("vlmo_ds.planning.doctor", *joint, "stages.joint.optimizer.lr=3", code=1)
    assert "joint: LOOK AT THIS: optimizer.lr is 3" in done.stdout
    assert "does not fall on one batch of 8 samples" in done.stdout or "the loss is no number" in done.stdout
    folder = tmp_path / "same"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(40):
            for name, data in (
                (f"{number}.png", png(9, 9, 9)),
                (f"{number}.txt", b"a picture"),
                (f"{number}.json", json.dumps({}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    call("vlmo_ds.data.index", folder)
    recipe["stages"] = [
        recipe["stages"][-1]
        | {"data": {"shards": [str(folder)], "lanes": 8}, "init": {"weights": "fresh"}, "tasks": {"itc": None}}
    ]
    write_yaml(file, recipe | {"retrieval": None, "tokenizer": {"name": "train", "vocab_size": 60}})
    done = call("vlmo_ds.planning.doctor", "--recipe", file, "--seconds", "100", code=1)
    for words in (
        "100% of the captions are 'a picture'",
        "98% of the pictures are copies",
        "show one colour",
        "itc: does not fall",
    ):
        assert words in done.stdout, done.stdout


def test_what_cannot_be_used_is_an_error(tmp_path):
    done = call("vlmo_ds.planning.doctor", "--recipe", tmp_path / "none.yaml", code=2)
    assert done.stderr.startswith("error: ") or "error: " in done.stderr
