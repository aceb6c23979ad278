"""Batches: what is in them, and that they depend on neither ranks, workers, prefetching nor where a run was resumed."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import reads
from data.files import jpeg, write_tar

from vlmo_ds.config import DataConfig, RecipeError
from vlmo_ds.data.loader import BatchDataset, batches, spec_for
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.tokenizer import train_tokenizer

GLOBAL = 16
TOKENIZER = train_tokenizer([f"picture {i} of a caption in words" for i in range(100)], 120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources: 'photos' with several captions for each image, 'drawings' with one."""
    root = tmp_path_factory.mktemp("stream")
    for source, sizes in {"photos": (13, 20, 7, 11), "drawings": (9, 14)}.items():
        (root / source).mkdir()
        for number, size in enumerate(sizes):
            members = {}
            for i in range(size):
                pixels = np.random.default_rng([number, i]).integers(0, 255, 3)
                members[f"{i:03d}.jpg"] = jpeg((40 + i, 30), tuple(map(int, pixels)))
                captions = [f"picture {i} of {source} " + "word " * (i % 9) + str(j) for j in range(3)]
                members[f"{i:03d}.json"] = json.dumps({"captions": captions}).encode()
            write_tar(root / source / f"{number:03d}.tar", members)
    return root


def stream(root, *, rank=0, ranks=1, tasks=("mlm", "itc"), sources=True, **changes) -> BatchDataset:
    where = (
        {"sources": {name: {"shards": [str(root / name)], "weight": w} for name, w in (("photos", 3), ("drawings", 1))}}
        if sources
        else {"shards": [str(root / "photos"), str(root / "drawings")]}
    )
    data = DataConfig(**{**where, "lanes": 8, "shuffle": 6, **changes})
    spec = spec_for(reads(*tasks), 32, 8, 24, 3)
    return BatchDataset(data, spec, TOKENIZER, rank=rank, world_size=ranks, batch_size=GLOBAL // ranks)


def rows(parts: list[dict]) -> list[dict]:
    """The samples of a global batch from its ranks' parts, padding cut off."""
    found = []
    for part in parts:
        for i in range(len(part["sample_id"])):
            length = int(part["text_masks"][i].sum()) if "text_masks" in part else 0
            row = {k: v[i] for k, v in part.items() if k != "replaced"}
            found.append({k: (v[:length] if k.startswith("text_") else v).numpy().tobytes() for k, v in row.items()})
    return found


def drawn(root, ranks: int, workers: int, start: int, stop: int, prefetch: int = 4, **changes) -> list[list[dict]]:
    parts = [
        batches(stream(root, rank=r, ranks=ranks, **changes), start, stop, workers, prefetch) for r in range(ranks)
    ]
    return [rows(list(batch)) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("changes", [{}, {"mixing": "exact", "length_bucketing": 4}, {"sources": False}])
def test_the_first_fifty_batches_do_not_depend_on_ranks_and_workers(shards, changes):
    alone = drawn(shards, 1, 0, 0, 50, **changes)
    assert len({row["sample_id"] for batch in alone for row in batch}) == 74
    for ranks, workers, prefetch in ((1, 2, 1), (2, 1, 4), (2, 2, 7), (4, 1, 2)):
        assert drawn(shards, ranks, workers, 0, 50, prefetch, **changes) == alone, (ranks, workers)


def test_masks_of_images_do_not_depend_on_ranks(shards):
    assert drawn(shards, 1, 0, 0, 10, tasks=("mim",)) == drawn(shards, 4, 1, 0, 10, tasks=("mim",))


@pytest.mark.parametrize("changes", [{}, {"length_bucketing": 3}])
def test_resumed_at_twenty_positions_at_another_rank_count(shards, changes):
    """60 batches are 13 epochs of one source and 17 of the other."""
    whole = drawn(shards, 1, 0, 0, 60, **changes)
    positions = random.Random(4).sample(range(57), 20)
    for number, position in enumerate(positions):
        ranks = (2, 4, 1, 8)[number % 4]
        assert drawn(shards, ranks, number % 2, position, position + 3, **changes) == whole[position : position + 3]


def test_no_sample_is_seen_twice_or_missed_in_an_epoch(shards):
    seen = {"photos": [], "drawings": []}
    data = stream(shards)
    for i in range(40):
        ids = data[i]["sample_id"].tolist()
        for place, sample in zip(data.order.batch(i, GLOBAL), ids, strict=True):
            seen[data.names[place.source]].append((place.epoch, sample))
    for name, size in (("photos", 51), ("drawings", 23)):
        counts = Counter(seen[name])
        last = max(epoch for epoch, _ in counts)
        assert last > 3 and set(counts.values()) == {1}
        for epoch in range(last - 1):  # the last ones may be under way in some lanes
            assert sum(at == epoch for at, _ in counts) == size


def test_captions_of_an_image_change_with_the_epoch(shards):
    texts = {}
    data = stream(shards)
    for i in range(40):
        batch = data[i]
        for sample, ids in zip(batch["sample_id"].tolist(), batch["text_ids"], strict=True):
            texts.setdefault(sample, set()).add(TOKENIZER.decode(ids, skip_special_tokens=True).split()[-1])
    assert np.mean([len(found) for found in texts.values()]) > 2


def test_batches_have_what_the_tasks_need(synthetic):
    def batch_of(folder, *tasks, **changes):
        return stream(synthetic, tasks=tasks, sources=False, **{"shards": [str(synthetic / folder)], **changes})[0]

    batch = batch_of("train", "mlm", "itc")
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (GLOBAL, 3, 32, 32)
    assert batch["text_ids"].shape[1] % 8 == 0 and batch["text_ids"].shape[1] <= 24
    assert torch.equal(batch["text_masks"], (batch["text_ids"] != 0).long())
    assert ((batch["text_labels_mlm"] != -100).sum(1) > 0).all()
    assert set(batch_of("train", "mim")) == {"image", "image_mask", "image_id", "sample_id", "replaced"}
    assert "image" not in batch_of("text", "textmlm")


def test_false_images_and_texts_are_of_other_pictures(shards):
    one, again = (stream(shards, draw_false_image=2, draw_false_text=1)[0] for _ in range(2))
    for key in ("false_image_0", "false_image_1", "false_text_0_ids", "false_text_0_masks"):
        assert torch.equal(one[key], again[key])
    assert one["false_image_0"].shape == one["image"].shape
    for i in range(GLOBAL):
        assert not torch.equal(one["false_image_0"][i], one["image"][i])
        assert not torch.equal(one["false_image_0"][i], one["false_image_1"][i])
    two_ranks = [stream(shards, rank=r, ranks=2, draw_false_image=2)[0]["false_image_1"] for r in range(2)]
    assert torch.equal(torch.cat(two_ranks), one["false_image_1"])


def test_augmentation_changes_with_the_epoch(synthetic):
    pixels = {}
    where = {"shards": [str(synthetic / "train")], "transform": "square_transform_randaug"}
    data = stream(synthetic, sources=False, **where)
    for i in range(12):  # two epochs
        batch = data[i]
        for sample, image in zip(batch["sample_id"].tolist(), batch["image"], strict=True):
            pixels.setdefault(sample, []).append(image.numpy().tobytes())
    assert {len(found) for found in pixels.values()} == {2}
    assert sum(first == second for first, second in pixels.values()) < 10


def test_a_source_has_its_own_transform(shards):
    where = {
        "photos": {"shards": [str(shards / "photos")], "transform": "pixelbert"},
        "drawings": {"shards": [str(shards / "drawings")]},
    }
    data = BatchDataset(
        DataConfig(sources=where, transform="square_transform"),
        spec_for(reads("itc"), 32, 8, 24, 3),
        TOKENIZER,
        rank=0,
        world_size=1,
        batch_size=GLOBAL,
    )
    batch = data[0]
    for place, image in zip(data.order.batch(0, GLOBAL), batch["image"], strict=True):
        grey_border = bool((image[:, 0] == 128).all())
        assert grey_border == (data.names[place.source] == "photos")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Pictures with one to four questions, and pairs of pictures with one or two sentences."""
    root = tmp_path_factory.mktemp("questions")
    asked, pairs = {}, {}
    for i in range(20):
        entries = [
            {
                "question": f"picture {i} of words {k}",
                "question_id": 10 * i + k,
                "labels": [k, 4],
                "scores": [1.0, 0.3],
                "answers": ["one"] * (k + 1) + ["one of picture"] * (9 - k),
            }
            for k in range(1 + i % 4)
        ]
        asked |= {
            f"{i:02d}.jpg": jpeg((20, 20), (i * 10, 0, 0)),
            f"{i:02d}.json": json.dumps({"questions": entries}).encode(),
        }
        judged = [
            {"sentence": f"caption {i} of words {k}", "label": ("True", "False")[k], "identifier": "x"}
            for k in range(1 + i % 2)
        ]
        pairs |= {f"{i:02d}.{n}.jpg": jpeg((20, 20), (200 * n, 0, 0)) for n in (0, 1)}
        pairs[f"{i:02d}.json"] = json.dumps({"sentences": judged}).encode()
    write_tar(root / "asked.tar", asked)
    write_tar(root / "pairs.tar", pairs)
    return root


def asked(root, task: str, answers: int = 5, **settings) -> BatchDataset:
    name = {"vqa": "asked", "nlvr2": "pairs"}[task]
    data = DataConfig(shards=[str(root / f"{name}.tar")], lanes=4, transform="square_transform", **settings)
    spec = spec_for(reads(task), 32, 8, 24, 3, answers)
    return BatchDataset(data, spec, TOKENIZER, rank=0, world_size=1, batch_size=20)


def test_every_question_comes_once_in_as_many_epochs_as_its_picture_has(questions):
    data = asked(questions, "vqa")
    seen = Counter()
    for epoch in range(12):  # of 1, 2, 3 and 4 questions each
        batch = data[epoch]
        assert "answers" not in batch and batch["vqa_targets"].shape == (20, 5)
        for ids, targets in zip(batch["text_ids"], batch["vqa_targets"], strict=True):
            text = TOKENIZER.decode(ids, skip_special_tokens=True)
            seen[text] += 1
            label = int(text.split()[-1])
            expected = torch.zeros(5)
            expected[4], expected[label] = 0.3, 1.0
            assert torch.equal(targets, expected), (text, targets)
    assert len(seen) == 50
    assert all(count == 12 // (1 + int(text.split()[1]) % 4) for text, count in seen.items())


def test_several_questions_of_a_picture_are_read_with_it_once(questions):
    data = asked(questions, "vqa", questions_per_image=3)
    seen = Counter()
    for epoch in range(4):
        batch = data[epoch]
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in batch["text_ids"]]
        assert len(batch["image"]) == 20 and len(texts) == len(set(texts)) == len(batch["vqa_targets"])
        pictures = [int(text.split()[1]) for text in texts]
        assert Counter(pictures) == {i: min(3, 1 + i % 4) for i in range(20)}
        red = batch["image"][batch["question_image"], 0].float().mean((1, 2))
        assert red.tolist() == pytest.approx([10 * i for i in pictures], abs=4)
        seen.update(texts)
    assert len(seen) == 50
    assert all(count == (3 if int(text.split()[1]) % 4 == 3 else 4) for text, count in seen.items())


def test_answers_as_texts_with_the_share_of_those_who_gave_them(questions):
    data = DataConfig(shards=[str(questions / "asked.tar")], lanes=4, transform="square_transform")
    spec = spec_for({"image", "questions", "answers"}, 32, 8, 24, 3, 5)
    batch = BatchDataset(data, spec, TOKENIZER, rank=0, world_size=1, batch_size=20)[0]
    assert "vqa_targets" not in batch
    one, three = (TOKENIZER(text)["input_ids"] for text in ("one", "one of picture"))
    for ids, answers, lengths, weights in zip(
        *(batch[name] for name in ("text_ids", "answer_ids", "answer_lengths", "answer_weights")), strict=True
    ):
        k = int(TOKENIZER.decode(ids, skip_special_tokens=True).split()[-1])
        assert lengths.tolist() == [len(one), len(three)]
        assert answers[0, : len(one)].tolist() == one and answers[1, : len(three)].tolist() == three
        assert weights.tolist() == pytest.approx([(k + 1) / 10, (9 - k) / 10])


def test_captions_behind_a_prompt(shards):
    batch = stream(shards, prompt="picture of", tasks=("itc",))[0]
    words = len(TOKENIZER("picture of")["input_ids"]) - 1
    assert batch["prompt_words"].tolist() == [words] * GLOBAL
    plain = stream(shards, tasks=("itc",))[0]
    assert "prompt_words" not in plain
    for ids, ids_alone in zip(batch["text_ids"], plain["text_ids"], strict=True):
        text, alone = (TOKENIZER.decode(row, skip_special_tokens=True) for row in (ids, ids_alone))
        assert text.startswith("picture of ") and alone.startswith(text.removeprefix("picture of ")[:20])
    with pytest.raises(RecipeError, match="data.prompt 'word word .* leaves no place for a caption"):
        stream(shards, prompt="word " * 30)[0]


def test_pairs_of_pictures_keep_their_order(questions):
    batch = asked(questions, "nlvr2")[0]
    assert "image" not in batch and batch["image_0"].shape == (20, 3, 32, 32)
    assert int(batch["image_0"][:, 0].max()) < 30 and int(batch["image_1"][:, 0].min()) > 170
    for ids, answer in zip(batch["text_ids"], batch["answers"].tolist(), strict=True):
        assert answer == 1 - int(TOKENIZER.decode(ids, skip_special_tokens=True).split()[-1])


def test_labels_past_the_list_of_answers_name_the_setting(questions):
    data = asked(questions, "vqa", answers=3)
    with pytest.raises(DataError, match="do not fit 3 answers"):
        data[0]


def test_shards_without_questions_say_what_is_missing(shards):
    data = DataConfig(shards=[str(shards / "photos")])
    dataset = BatchDataset(data, spec_for(reads("vqa"), 32, 8, 24, 3, 5), TOKENIZER, rank=0, world_size=1, batch_size=4)
    with pytest.raises(DataError, match="its .json lists no 'questions'; prepare the shards"):
        dataset[0]
