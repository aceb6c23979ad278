"""Masks, transforms, tokenizer, and the synthetic world."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from data.files import jpeg
from PIL import Image
from transformers import BertTokenizer

from vlmo_ds.config import CROPPING
from vlmo_ds.data import synthetic as world
from vlmo_ds.data.masking import IGNORE, mask_blocks, mask_tokens
from vlmo_ds.data.order import generator
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.tokenizer import hub_is_reachable, load_tokenizer, train_tokenizer, vocabulary_digest
from vlmo_ds.data.transforms import TRANSFORMS, Crops, EncodedImage

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
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(buffer, "PNG")
    first, again, other = (TRANSFORMS[name](EncodedImage(buffer.getvalue()), 32, generator(s)) for s in (1, 1, 2))
    assert first.size == (32, 32) and first.mode == "RGB"
    assert np.array_equal(first, again)
    assert (name in ("square_transform", "pixelbert")) == np.array_equal(first, other)


def test_random_crops_as_large_and_as_mirrored_as_asked():
    """A picture whose red grows from left to right and whose green from top to bottom: a crop's colours say where it was."""
    across = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(across[None], across[:, None], np.uint8(0)), axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")

    def crops(smallest, flip) -> tuple[list[float], int]:
        areas, mirrored = [], 0
        for seed in range(60):
            made = TRANSFORMS["crop_flip"](EncodedImage(buffer.getvalue()), 32, generator(seed), Crops(smallest, flip))
            red, green = (np.asarray(made)[:, :, i].astype(float) for i in (0, 1))
            areas.append(abs(red[0, -1] - red[0, 0]) * abs(green[-1, 0] - green[0, 0]) / 255**2)
            mirrored += red[0, -1] < red[0, 0]
        return areas, mirrored

    for smallest, flip, least in ((None, True, 0.4), (0.9, False, 0.8), (0.1, True, 0.05)):
        areas, mirrored = crops(smallest, flip)
        assert least < min(areas) < least + 0.25
        assert (15 < mirrored < 45) if flip else mirrored == 0


@pytest.mark.parametrize("name", TRANSFORMS)
def test_settings_of_crops_are_for_those_that_crop(name):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(buffer, "PNG")
    usual, asked = (
        [np.asarray(TRANSFORMS[name](EncodedImage(buffer.getvalue()), 32, generator(s), crops)) for s in range(4)]
        for crops in (Crops(), Crops(0.9, False))
    )
    assert np.array_equal(usual, asked) == (name not in CROPPING)


def test_pixelbert_keeps_the_aspect_ratio():
    image = np.asarray(TRANSFORMS["pixelbert"](EncodedImage(jpeg((40, 20), (255, 0, 0))), 32, generator(0)))
    assert (image[:8] == 128).all() and (image[24:] == 128).all()
    assert (abs(image[8:24].astype(int) - (254, 0, 0)) < 3).all()


def photograph(size) -> Image.Image:
    """Smooth structure with some noise, as photographs have."""
    y, x = np.mgrid[: size[1], : size[0]] / 40
    waves = np.stack([np.sin(x + c) * np.cos(y - c) for c in range(3)], -1) * 100 + 128
    return Image.fromarray((waves + np.random.default_rng(0).normal(0, 4, waves.shape)).clip(0, 255).astype(np.uint8))


def test_reduced_decoding_shows_the_same_picture():
    buffer = io.BytesIO()
    photograph((1203, 901)).save(buffer, "JPEG", quality=90)
    image = EncodedImage(buffer.getvalue())
    assert image.decode().shape == (901, 1203, 3) and image.decode(2).shape == (226, 301, 3)
    whole = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

    def difference(box):
        wanted = whole.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        return abs(np.asarray(image.resized(224, 224, box)).astype(int) - np.asarray(wanted))

    assert difference((100, 52, 1100, 852)).mean() < 0.5
    assert difference((101, 51, 1101, 851)).mean() < 2.0  # the box moves by a quarter of a pixel
    assert difference((11, 7, 400, 300)).max() <= 1  # no reduction possible: nothing may be lost


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_in_other_colours(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (90, 90, 90)).convert(mode).save(buffer, "JPEG")
    image = EncodedImage(buffer.getvalue()).resized(16, 16)
    assert image.mode == "RGB" and abs(np.asarray(image).astype(int) - 90).max() < 4


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a readable image"),
        (b"hello world", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (b"\xff\xd8\xff\xe0 not a JPEG", "not a readable image"),
        (jpeg((200, 200))[:700], "not a readable image"),
    ],
)
def test_unreadable_images_say_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        EncodedImage(data).decode()


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
        EncodedImage(bomb).decode()


# ---- tokenizer ----


def test_trained_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(["a small red circle", "a large blue square"] * 20, 60)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    ids = again("A small BLUE circle")["input_ids"]
    assert again.decode(ids) == "[CLS] a small blue circle [SEP]"
    assert again.pad_token_id == 0 and again("red").word_ids()[0] is None


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_training_a_tokenizer_repeats(kind):
    texts = [f"word{i} number {i % 7}, and a line!" for i in range(200)]
    assert len({train_tokenizer(texts, 320, kind).backend_tokenizer.to_str() for _ in range(5)}) == 1


SCRIPTS = (
    "笑っている顔、ネコ",
    "وجه مبتسم، قطة",
    "हिन्दी में मुस्कुराता चेहरा",
    "می‌خواهم",
    "หน้ายิ้ม",
    "Ein süßer Hund: it's 25¢!",
)


def test_byte_pairs_write_every_script(tmp_path):
    """Also characters that were in no text; and the tokenizer that is saved is the one that is loaded."""
    tokenizer = train_tokenizer(SCRIPTS[:3] * 3, 300, "byte_bpe")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert vocabulary_digest(again) == vocabulary_digest(tokenizer) and len(again) == 300
    for text in SCRIPTS:
        ids = again(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and again.unk_token_id not in ids
        assert again.decode(ids, skip_special_tokens=True) == text
    wordpiece = train_tokenizer(SCRIPTS[:3] * 3, 300)
    assert wordpiece.unk_token_id in wordpiece(SCRIPTS[4])["input_ids"]
    assert again("  a\n dog ")["input_ids"] == again("a dog")["input_ids"]
    dog = again("dog")["input_ids"][1:-1]
    assert again("a dog")["input_ids"][-1 - len(dog) : -1] == dog  # at the start of a text as elsewhere


@pytest.mark.parametrize("text, words", [("हिन्दी में चेहरा", 3), ("می‌خواهم قطة", 2), ("süßer Hund: 25¢", 5)])
def test_words_of_bytes_are_masked_as_a_whole(text, words):
    tokenizer = train_tokenizer(["a"], 261, "byte_bpe")  # each byte a piece
    encoding = tokenizer(text)
    ids, word_of = np.array(encoding["input_ids"]), encoding.word_ids()
    assert len(ids) == len(text.encode()) + 3 and len({*word_of} - {None}) == words
    for seed in range(20):
        _, labels = mask_tokens(
            ids, word_of, probability=0.7, whole_word=True, mask_id=4, vocab_size=261, rng=np.random.default_rng(seed)
        )
        covered = labels != IGNORE
        assert covered.any()
        for word in range(words):
            assert len({bool(covered[i]) for i, of in enumerate(word_of) if of == word}) == 1


def test_any_part_of_a_word_longer_than_the_budget_is_masked():
    tokenizer = train_tokenizer(["a"], 261, "byte_bpe")
    encoding = tokenizer("笑っている顔")  # one word of 18 bytes
    masked = set()
    for seed in range(200):
        _, labels = mask_tokens(
            encoding["input_ids"],
            encoding.word_ids(),
            probability=0.15,
            whole_word=True,
            mask_id=4,
            vocab_size=261,
            rng=np.random.default_rng(seed),
        )
        (places,) = np.nonzero(labels != IGNORE)
        assert places.tolist() == list(range(places[0], places[0] + 3))
        masked |= set(places.tolist())
    assert masked == set(range(1, 20))


def test_berts_vocabulary(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "bert-base-uncased"))
    ids = tokenizer("An unaffable dog.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "an", "una", "##ffa", "##ble", "dog", ".", "[SEP]"]
    assert (ids[0], ids[-1]) == (101, 102)
    assert len(tokenizer) == 30522


UNCASED = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused0]",
    "<S>",
    "a",
    "dog",
    "paris",
    "cafe",
    "Ⅱ",
    "中",
    "国",
]
CASED = [*UNCASED, "A", "Paris", "café"]
GERMAN = [*UNCASED, "café"]  # lower case with accents
SENTENCE = "A dog Paris café CAFÉ 中国"
AS_UNCASED = ["a", "dog", "paris", "cafe", "cafe", "中", "国"]
AS_CASED = ["A", "dog", "Paris", "café", "[UNK]", "中", "国"]


@pytest.mark.parametrize(
    "pieces, settings, wanted",
    [
        (UNCASED, None, AS_UNCASED),
        (CASED, None, AS_CASED),
        (GERMAN, None, ["a", "dog", "paris", "café", "café", "中", "国"]),
        (CASED, {}, AS_CASED),
        (CASED, {"do_lower_case": False}, AS_CASED),
        (UNCASED, {"do_lower_case": False}, ["[UNK]", "dog", "[UNK]", "[UNK]", "[UNK]", "中", "国"]),
        (CASED, {"do_lower_case": True}, AS_UNCASED),
        (CASED, {"do_lower_case": True, "strip_accents": None}, AS_UNCASED),
        (CASED, {"do_lower_case": True, "strip_accents": False}, ["a", "dog", "paris", "café", "café", "中", "国"]),
        (CASED, {"do_lower_case": False, "strip_accents": True}, ["A", "dog", "Paris", "cafe", "[UNK]", "中", "国"]),
        (UNCASED, {"tokenize_chinese_chars": False}, [*AS_UNCASED[:5], "[UNK]"]),
    ],
)
def test_a_vocabulary_is_cased_as_its_files_or_its_pieces_say(pieces, settings, wanted, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in (tmp_path, tmp_path / "vocab.txt"):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.tokenize(SENTENCE) == wanted
    tokenizer.save_pretrained(tmp_path / "saved")  # as a run keeps it, and an exported model has it
    assert load_tokenizer(str(tmp_path / "saved")).tokenize(SENTENCE) == wanted


def test_a_folder_of_transformers_is_obeyed(tmp_path):
    vocab = {piece: number for number, piece in enumerate(CASED)}
    for lower, wanted in ((False, AS_CASED), (True, AS_UNCASED)):
        BertTokenizer(vocab=vocab, do_lower_case=lower).save_pretrained(tmp_path / str(lower))
        assert load_tokenizer(str(tmp_path / str(lower))).tokenize(SENTENCE) == wanted


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("tokenizer_config.json", b'{"do_lower_case": "no"}', "has do_lower_case 'no'; accepted: true, false or null"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json cannot be read"),
        ("vocab.txt", b"caf\xe9\n", "vocab.txt is no list of word pieces"),
        ("vocab.txt", b"a\nb\n", r"has no \[CLS\] or no \[SEP\]"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer.json", b"\xff", "cannot be read"),
    ],
)
def test_damaged_tokenizers_are_named(name, content, reason, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(UNCASED) + "\n", "utf-8")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"tokenizer: .*{reason}"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo_ds.data.tokenizer.ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    assert not hub_is_reachable()
    with pytest.raises(DataError, match="tokenizer: 'no-such-tokenizer' is no folder here"):
        load_tokenizer("no-such-tokenizer")
    with pytest.raises(DataError, match="holds neither tokenizer.json nor vocab.txt"):
        load_tokenizer(str(tmp_path))


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


def small_pairs(folder):
    """A byte-pair vocabulary in CLIP's two forms: a .txt.gz of merges, and vocab.json with merges.txt."""
    import gzip

    from vlmo_ds.data.tokenizer import bytes_to_characters

    merges = ["t h", "th e</w>", "a n", "an d</w>", "d o", "do g</w>"]
    (folder / "pairs.txt.gz").write_bytes(gzip.compress("\n".join(["#version", *merges]).encode()))
    alphabet = bytes_to_characters()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def test_clips_byte_pairs_in_every_form(tmp_path):
    small_pairs(tmp_path)
    anyone = ((), None)
    first = load_tokenizer(str(tmp_path / "pairs.txt.gz"), *anyone)
    text = "The dog &amp;amp; “the” dog’s  cafÃ©"
    ids = first(text)["input_ids"]
    assert first.convert_ids_to_tokens(ids)[:3] == ["<|startoftext|>", "the</w>", "dog</w>"]
    assert first.decode(ids, skip_special_tokens=True) == 'the dog & " the " dog \'s café'
    second = load_tokenizer(str(tmp_path), *anyone)
    assert second(text)["input_ids"] == ids
    second.save_pretrained(str(tmp_path / "saved"))
    third = load_tokenizer(str(tmp_path / "saved"), *anyone)
    assert third([text, "a"])["input_ids"] == [ids, third("a")["input_ids"]]
    assert len(third(text, truncation=True, max_length=5)["input_ids"]) == 5


@pytest.mark.parametrize("name, content", [
    ("a.txt.gz", b"no gzip"), ("vocab.json", b"[1]"), ("vocab.json", b'{"a": 1}'), ("merges.txt", b"one two three\n"),
])  # fmt: skip
def test_byte_pairs_that_cannot_be_used_are_told(tmp_path, name, content):
    small_pairs(tmp_path)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if name.endswith(".gz") else tmp_path
    with pytest.raises(DataError, match="byte pairs|cannot be used"):
        load_tokenizer(str(path), (), None)


def test_a_tokenizer_without_start_and_end_is_told(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", unk_token="<pad>").save_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="puts 0 ids around a text"):
        load_tokenizer(str(tmp_path), (), None)


def test_a_sentencepiece_model_has_the_numbers_of_xlm_roberta(tmp_path):
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    words = ["\u2581a", "\u2581red", "\u2581circle", "\u2581", "b", "l", "u", "e", "blue", "\u2581be"]
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((word, -1.0 - n, 1) for n, word in enumerate(words)),
    ]
    for piece, score, kind in pieces:
        one = model.pieces.add()
        one.piece, one.score, one.type = piece, score, kind
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 0
    file = tmp_path / "beit3.spm"
    file.write_bytes(model.SerializeToString())
    for tokenizer in (load_tokenizer(str(file), padding=None), None):
        tokenizer = tokenizer or load_tokenizer(str(tmp_path / "saved"), padding=None)
        encoding = tokenizer("a red circle blue x")
        # <s>, the model's pieces one number higher, <unk>, </s>
        assert encoding["input_ids"] == [0, 4, 5, 6, 7, 12, 7, 3, 2]
        assert encoding.word_ids() == [None, 0, 1, 2, 3, 3, 4, 4, None]
        assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (1, 14, 15)
        tokenizer.save_pretrained(str(tmp_path / "saved"))
    file.write_bytes(b"no model")
    with pytest.raises(
        DataError, match=r"beit3.spm cannot be read as a SentencePiece model of kind unigram \("
    ) as told:
        load_tokenizer(str(file))
    assert "\n" not in str(told.value)
