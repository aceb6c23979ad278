"""Order, masks, transforms, tokenizer, shards and batches."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmo_ds.config import DataConfig
from vlmo_ds.data import synthetic as world
from vlmo_ds.data.loader import BatchDataset, batches, check_samples, spec_for
from vlmo_ds.data.masking import mask_blocks, mask_tokens
from vlmo_ds.data.order import SampleOrder, generator
from vlmo_ds.data.shards import DataError, expand, list_shards, read_sample
from vlmo_ds.data.tokenizer import hub_is_reachable, load_tokenizer, train_tokenizer
from vlmo_ds.data.transforms import TRANSFORMS, decode

COUNTS = [5, 30, 1, 17, 11]


def jpeg(size=(20, 10), colour=(200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- order ----


@pytest.mark.parametrize("lanes, window", [(1, 100), (4, 3), (8, 1), (64, 7), (1000, 4)])
def test_each_lane_sees_its_part_of_an_epoch_once(lanes, window):
    order = SampleOrder(COUNTS, lanes=lanes, window=window, seed=1)
    for epoch in range(3):
        seen = Counter()
        for lane in range(order.lanes):
            length = (lane + 1) * 64 // order.lanes - lane * 64 // order.lanes
            for position in range(epoch * length, (epoch + 1) * length):
                at, shard, row = order.locate(lane, position)
                assert at == epoch
                seen[shard, row] += 1
        assert seen == Counter({(s, r): 1 for s, n in enumerate(COUNTS) for r in range(n)})


def test_order_depends_on_seed_and_epoch_only():
    def first(seed):
        order = SampleOrder(COUNTS, lanes=4, window=8, seed=seed)
        return [order.batch(i, 8) for i in range(20)]

    assert first(1) == first(1) != first(2)
    fresh = SampleOrder(COUNTS, lanes=4, window=8, seed=1)
    assert fresh.batch(13, 8) == first(1)[13]  # any position, without the ones before


def test_a_rank_stays_on_its_lanes():
    order = SampleOrder([100] * 8, lanes=8, window=10, seed=0)
    shards = {shard for i in range(10) for _, shard, _ in order.batch(i, 16)[:4]}  # the first of four ranks
    assert len(shards) == 2


# ---- masks ----


def test_whole_words_are_masked_together_within_the_budget():
    ids, words = list(range(10, 50)), [None, *[i // 3 for i in range(38)], None]
    for seed in range(50):
        inputs, labels = mask_tokens(
            ids, words, probability=0.15, whole_word=True, mask_id=4, vocab_size=100, rng=generator(seed)
        )
        covered = np.flatnonzero(labels != -100)
        assert 4 <= len(covered) <= 6 and 0 not in covered and 39 not in covered
        assert set(covered.tolist()) == {i for i, w in enumerate(words) if w in {words[c] for c in covered}}
        assert (labels[covered] == np.asarray(ids)[covered]).all()
        untouched = np.setdiff1d(np.arange(40), covered)
        assert (inputs[untouched] == np.asarray(ids)[untouched]).all()


def test_eighty_ten_ten():
    kinds = Counter()
    for seed in range(400):
        ids = list(range(1000, 1040))
        inputs, labels = mask_tokens(
            ids, list(range(40)), probability=0.25, whole_word=True, mask_id=4, vocab_size=1000, rng=generator(seed)
        )
        for i in np.flatnonzero(labels != -100):
            kinds["mask" if inputs[i] == 4 else "same" if inputs[i] == ids[i] else "random"] += 1
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.02)


def test_every_text_has_a_label():
    for words in ([None, 0, 0, 0, 0, 0, 0, 0, None], [None, 0, None]):
        _, labels = mask_tokens(
            list(range(1, len(words) + 1)),
            words,
            probability=0.15,
            whole_word=True,
            mask_id=4,
            vocab_size=9,
            rng=generator(1),
        )
        assert (labels != -100).sum() == 1


@pytest.mark.parametrize("window", [8, 14, 24])
def test_blocks_cover_exactly_the_share_and_hang_together(window):
    neighbours = []
    for seed in range(30):
        mask = mask_blocks(window, 0.4, generator(seed))
        assert mask.sum() == round(0.4 * window**2)
        square = mask.reshape(window, window)
        neighbours.append((square[1:] & square[:-1]).sum() / mask.sum())
    assert np.mean(neighbours) > 0.5  # single random patches would give 0.4 (1 - 1/window)


# ---- transforms ----


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_the_size_and_repeat(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    first, again, other = (TRANSFORMS[name](image, 32, generator(s)) for s in (1, 1, 2))
    assert first.size == (32, 32) and first.mode == "RGB"
    assert np.array_equal(first, again)
    assert (name == "square") == np.array_equal(first, other)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a readable image"),
        (b"hello world", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
    ],
)
def test_unreadable_images_say_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode(data)


def test_a_decompression_bomb_is_refused():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match="exceeds limit|at most"):
        decode(bomb)


# ---- tokenizer ----


def test_trained_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(["a small red circle", "a large blue square"] * 20, 60)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    ids = again("A small BLUE circle")["input_ids"]
    assert again.decode(ids) == "[CLS] a small blue circle [SEP]"
    assert again.pad_token_id == 0 and again("red").word_ids()[0] is None


def test_training_a_tokenizer_repeats():
    texts = [f"word{i} number {i % 7}, and a line!" for i in range(200)]
    assert len({tuple(sorted(train_tokenizer(texts, 120).get_vocab().items())) for _ in range(5)}) == 1


def test_berts_vocabulary(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "bert-base-uncased"))
    ids = tokenizer("An unaffable dog.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "an", "una", "##ffa", "##ble", "dog", ".", "[SEP]"]
    assert (ids[0], ids[-1]) == (101, 102)
    assert len(tokenizer) == 30522


def test_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo_ds.data.tokenizer.ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    assert not hub_is_reachable()
    with pytest.raises(DataError, match="tokenizer: 'no-such-tokenizer' is no folder here"):
        load_tokenizer("no-such-tokenizer")
    with pytest.raises(DataError, match="holds neither tokenizer.json nor vocab.txt"):
        load_tokenizer(str(tmp_path))


# ---- shards ----


def test_expand_and_count(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"a-{i:03d}.tar", {"x.jpg": jpeg(), "x.txt": b"one", "y.jpg": jpeg(), "y.txt": b"two"})
    names = [p.name for p in expand([f"{tmp_path}/a-{{000..001}}.tar", f"{tmp_path}/a-00[2].tar"])]
    assert names == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert [s.samples for s in list_shards([str(tmp_path)])] == [2, 2, 2]


@pytest.mark.parametrize(
    "name, message", [("missing.tar", "missing.tar does not exist"), ("empty", "holds no .tar file")]
)
def test_missing_shards(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand([str(tmp_path / name)])


def test_unfinished_folder_is_refused(tmp_path):
    write_tar(tmp_path / "a-000000.tar", {"x.txt": b"one"})
    (tmp_path / "shard.tar.tmp").touch()
    with pytest.raises(DataError, match="is unfinished"):
        expand([str(tmp_path)])


def test_captions_and_ids(tmp_path):
    meta = json.dumps({"captions": ["a dog", "  ", "two\0 dogs"], "image_id": 42}).encode()
    path = write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(), "k.json": meta, "e.jpg": jpeg(), "e.txt": b" \n "})
    sample, empty = read_sample(path, 0), read_sample(path, 1)
    assert sample.captions == ["a dog", "two dogs"] and sample.image_id == 42
    assert sample.sample_id == read_sample(path, 0).sample_id != empty.sample_id == empty.image_id
    with pytest.raises(DataError, match="e has an empty caption"):
        _ = empty.captions


# ---- batches ----


def dataset(folder, tasks=("mlm", "itc"), rank=0, world=1, batch=8, **changes):
    data = DataConfig(shards=[str(folder)], **{"transform": "square_randaug", "lanes": 8, **changes})
    tokenizer = train_tokenizer(
        [c for s in list_shards([str(folder)]) for r in range(s.samples) for c in safe_captions(s.path, r)], 150
    )
    return BatchDataset(
        data,
        spec_for(dict.fromkeys(tasks, 1.0), 32, 8, 20, 3),
        tokenizer,
        rank=rank,
        world_size=world,
        batch_size=batch,
    )


def safe_captions(path, row):
    try:
        return read_sample(path, row).captions
    except DataError:
        return []


def test_batches_have_what_the_tasks_need(synthetic):
    batch = dataset(synthetic / "train")[0]
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (8, 3, 32, 32)
    assert batch["text_ids"].shape[1] <= 20 and torch.equal(batch["text_masks"], (batch["text_ids"] != 0).long())
    assert ((batch["text_labels_mlm"] != -100).sum(1) > 0).all()
    assert set(dataset(synthetic / "train", ["mim"])[0]) == {"image", "image_mask", "image_id", "sample_id", "replaced"}
    assert "image" not in dataset(synthetic / "text", ["textmlm"])[0]


def test_ranks_and_workers_do_not_change_the_batches(synthetic):
    whole = [dataset(synthetic / "train")[i] for i in range(6)]
    for ranks in (2, 4):
        parts = [dataset(synthetic / "train", rank=r, world=ranks, batch=8 // ranks) for r in range(ranks)]
        for i in range(6):
            pieces = [part[i] for part in parts]
            for key in ("image", "sample_id", "image_id"):
                assert torch.equal(torch.cat([p[key] for p in pieces]), whole[i][key])
            masked = [row[row != 0] for p in pieces for row in p["text_ids_mlm"]]
            assert all(torch.equal(a, b[b != 0]) for a, b in zip(masked, whole[i]["text_ids_mlm"], strict=True))
    for workers in (0, 2):
        stream = batches(dataset(synthetic / "train"), 2, 6, workers)
        assert [torch.equal(b["image"], w["image"]) for b, w in zip(stream, whole[2:], strict=True)] == [True] * 4


def test_augmentation_changes_with_the_epoch(synthetic):
    data = dataset(synthetic / "train", batch=96)
    first, second = data[0], data[1]
    by_id = {int(i): p for i, p in zip(first["sample_id"], first["image"], strict=True)}
    assert {int(i) for i in second["sample_id"]} == set(by_id)
    same = sum(torch.equal(by_id[int(i)], p) for i, p in zip(second["sample_id"], second["image"], strict=True))
    assert same < 10


def test_bad_samples_are_replaced_and_counted(tmp_path):
    members = {}
    for i in range(40):
        members[f"{i:03d}.jpg"] = b"not an image" if i == 7 else jpeg(colour=(i * 6, 0, 0))
        members[f"{i:03d}.txt"] = f"picture {i}".encode()
    write_tar(tmp_path / "a.tar", members)
    data = dataset(tmp_path, batch=40, max_bad_fraction=0.1)
    with pytest.warns(UserWarning, match="007: not a readable image"):
        batch = data[0]
    assert int(batch["replaced"]) == 1 and len(set(batch["sample_id"].tolist())) == 39
    check_samples(data)
    with pytest.raises(DataError, match=r"1 of 40 samples .*max_bad_fraction is 0.01.*a.tar:007"):
        check_samples(dataset(tmp_path))


# ---- the synthetic world ----


def test_scenes_are_distinct_and_repeat():
    held, train = world.scenes(3, 50, 200)
    assert len(set(held) | set(train)) == 250 and (held, train) == world.scenes(3, 50, 200)


def test_captions_tell_the_truth():
    rng = generator(1)
    for _ in range(300):
        scene = world.make_scene(rng)
        caption = world.describe(scene, rng)
        for thing in scene:
            assert f"{thing.colour} {thing.shape}" in caption
        assert sum(caption.count(shape) for shape in world.SHAPES) == len(scene)
        image = world.render(scene, generator(2), 64)
        assert image.size == (64, 64)


def test_objects_are_where_captions_say():
    thing = world.Thing("square", "red", "large", "plain", 0, 2)
    pixels = np.asarray(world.render((thing,), generator(0), 96)).astype(int)
    red = (pixels[..., 0] - pixels[..., 2]) > 100
    rows, columns = np.nonzero(red)
    assert thing.place == "in the top right corner"
    assert rows.mean() < 32 and columns.mean() > 64
