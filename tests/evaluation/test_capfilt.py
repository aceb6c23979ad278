"""CapFilt on real processes: what is written and left out, the same bytes however it is run, bad input."""

import hashlib
import io
import json
import signal
import tarfile
from collections import Counter

import pytest
from conftest import call, run_ranks, start_ranks, write_yaml
from families.blip.tiny import tiny_blip

from vlmo_ds.data.shards import list_shards
from vlmo_ds.data.synthetic import Thing
from vlmo_ds.evaluation.capfilt import Caption, Tally, captions_of, is_true

MODULE = "vlmo_ds.evaluation.capfilt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, synthetic):
    """A tiny run, and a set of six shards of captions of the web, of which two are by people."""
    folder = tmp_path_factory.mktemp("capfilt")
    recipe = tiny_blip(synthetic, retrieval=None, captioning=None)
    file = write_yaml(folder / "recipe.yaml", recipe)
    (folder / "ds.json").write_text(json.dumps({"steps_per_print": 10**9}))
    command = ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(folder / "ds.json")]
    run_ranks([*command, "--output_dir", str(folder / "run")], 1)
    samples = [(shard, row) for shard in list_shards([str(synthetic / "test")]) for row in range(shard.samples)]
    (folder / "web").mkdir()
    for number in range(6):
        with tarfile.open(folder / "web" / f"{number:03d}.tar", "w") as tar:
            for position, (shard, row) in enumerate(samples[4 * number : 4 * number + 4]):
                raw = shard.read(row)
                meta = {**raw.meta, "source": "human"} if number == 0 and position < 2 else raw.meta
                for extension, data in {**raw.fields, "json": json.dumps(meta).encode()}.items():
                    info = tarfile.TarInfo(f"{number}{position}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def words(command: str, trained, shards, output, *more) -> list[str]:
    return [command, str(trained / "run"), "--shards", str(shards), "--output", str(output), "--batch_size", "3", *more]


def digests(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def made(trained):
    """(captions written, filtered) of one process."""
    first = call(MODULE, *words("caption", trained, trained / "web", trained / "T", "--captions", "2"))
    assert "24 samples" in first.stdout and "synthetic: " in first.stdout
    scores = sorted(filtered_scores(trained))
    middle = str(scores[len(scores) // 2])
    out = call(MODULE, *words("filter", trained, trained / "T", trained / "U", "--threshold", middle)).stdout
    assert "human: " in out and "precision" in out and "recall" in out
    return trained / "T", trained / "U", float(middle)


def filtered_scores(trained) -> list[float]:
    call(MODULE, *words("filter", trained, trained / "T", trained / "all", "--threshold", "0"))
    return [c.score for raw in read(trained / "all") for c in captions_of(raw, "web") if c.score is not None]


def read(folder) -> list:
    return [shard.read(row) for shard in list_shards([str(folder)]) for row in range(shard.samples)]


def test_what_is_written_and_what_is_left_out(trained, made):
    captioned, filtered, threshold = made
    before, after = read(captioned), {raw.key: raw for raw in read(filtered)}
    assert len(before) == 24 and set(after) <= {raw.key for raw in before}
    originals = {raw.key: raw for raw in read(trained / "web")}
    dropped = 0
    for raw in before:
        entries = captions_of(raw, "web")
        source = "human" if raw.key in ("00", "01") else "web"
        own = [c for c in entries if c.source != "synthetic"]
        assert [c.text for c in own] == originals[raw.key].captions and {c.source for c in own} == {source}
        assert raw.captions == [c.text for c in entries] and raw.image == originals[raw.key].image
        assert raw.meta["things"] == originals[raw.key].meta["things"]
        left = after.get(raw.key)
        judged = captions_of(left, "web") if left else []
        for caption in judged:
            assert caption.score is None if caption.source == "human" else caption.kept == (caption.score >= threshold)
        dropped += left is None
        if left:
            assert left.captions == [c.text for c in judged if c.kept] and len(judged) == len(entries)
    summary = json.loads((filtered / "capfilt.json").read_text())
    assert summary["images"] == 24 and summary["images_dropped"] == dropped
    assert summary["kept"]["human"] == summary["seen"]["human"] > 0
    assert 0 < summary["kept"]["synthetic"] < summary["seen"]["synthetic"]
    assert sum(map(sum, summary["scores"].values())) == sum(summary["seen"].values()) - summary["seen"]["human"]
    page = (filtered / "report.html").read_text()
    assert "<h2>Kept</h2>" in page and "<h2>Dropped</h2>" in page and "data:image/" in page and "<svg" in page


def test_written_captions_instead_of_the_webs_where_those_do_not_fit(trained, made, tmp_path):
    captioned, filtered, threshold = made
    more = ("--threshold", str(threshold), "--synthetic", "instead")
    call(MODULE, *words("filter", trained, captioned, tmp_path / "U", *more))
    beside, instead = ({raw.key: captions_of(raw, "web") for raw in read(f)} for f in (filtered, tmp_path / "U"))
    assert set(beside) == set(instead)
    for key, captions in beside.items():
        own = [c.text for c in captions if c.kept and c.source != "synthetic"]
        written = [c.text for c in captions if c.kept and c.source == "synthetic"]
        assert [c.text for c in instead[key] if c.kept] == (own or written)
        assert [c.text for c in instead[key] if c.fits] == [c.text for c in captions if c.kept]  # also those to spare
    counted = [json.loads((folder / "capfilt.json").read_text()) for folder in (filtered, tmp_path / "U")]
    assert counted[0]["truth"] == counted[1]["truth"] and counted[0]["kept"]["web"] == counted[1]["kept"]["web"]
    assert counted[0]["kept"]["synthetic"] > counted[1]["kept"]["synthetic"] > 0


def test_the_same_bytes_on_two_ranks_and_after_a_kill(trained, made, tmp_path):
    captioned, filtered, threshold = made
    for name, command in (
        ("T", words("caption", trained, trained / "web", tmp_path / "T", "--captions", "2")),
        ("U", words("filter", trained, captioned, tmp_path / "U", "--threshold", str(threshold))),
    ):
        processes = start_ranks(["-m", MODULE, *command], 2)
        partial = tmp_path / f"{name}.partial"
        while not list(partial.glob("*.tar")) and all(process.poll() is None for process in processes):
            pass
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        run_ranks(["-m", MODULE, *command], 2)
        assert digests(tmp_path / name) == digests(captioned if name == "T" else filtered)
        assert not partial.exists()


@pytest.mark.parametrize("command, more, message", [
    ("caption", ["--output", "{web}/inside"], "is not apart from the shards"),
    ("filter", ["--shards", "{U}"], "was filtered already: name the shards"),
    ("filter", ["--threshold", "1.5"], "--threshold is 1.5; accepted: a probability"),
    ("caption", ["--top_p", "1.5"], "--top_p: Input should be less than or equal to 1"),
    ("caption", ["--min_length", "20", "--max_length", "10"], "min_length is 20, above"),
    ("caption", ["--max_length", "99"], "max_length is 99, the model's texts have 40 words at most"),
    ("caption", ["--output", "{T}"], "holds a finished shard set: choose another --output, or pass --overwrite"),
])  # fmt: skip
def test_bad_input(trained, made, tmp_path, command, more, message):
    known = {"web": trained / "web", "T": made[0], "U": made[1]}
    given = words(command, trained, trained / "web", tmp_path / "x", *(word.format(**known) for word in more))
    done = call(MODULE, *given, code=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_samples_that_cannot_be_used_are_left_out_and_counted(trained, tmp_path):
    """A damaged picture, an empty caption, an entry without a text: of five samples."""
    raw = read(trained / "web")[5]
    members = [
        raw.fields,
        {**raw.fields, "jpg": raw.image[:300]} if "jpg" in raw.fields else {**raw.fields, "png": raw.image[:300]},
        {name: data for name, data in raw.fields.items() if name not in ("json", "txt")} | {"txt": b"  "},
        {**raw.fields, "json": b'{"caption_entries": [{"text": "a"}]}'},
        {**raw.fields, "json": json.dumps({**raw.meta, "source": "flickr"}).encode()},
    ]
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "0.tar", "w") as tar:
        for position, fields in enumerate(members):
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{position}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    given = words("filter", trained, tmp_path / "web", tmp_path / "U", "--threshold", "0", "--source", "human")
    out = call(MODULE, *given).stdout
    assert "2 samples" in out and "3 rejected" in out and "has an empty caption" in out
    assert {c.source for raw in read(tmp_path / "U") for c in captions_of(raw, "web")} == {
        "human"
    }  # flickr says nothing
    out = call(MODULE, *words("caption", trained, tmp_path / "web", tmp_path / "T")).stdout
    assert "4 samples" in out and "1 rejected" in out  # pictures without a caption get their first


def test_runs_that_cannot(trained, made, tmp_path):
    contrast = trained / "run" / "checkpoints" / "contrast" / "final"
    for command, wanted in (("caption", "this needs the task lm"), ("filter", "this needs the task itm")):
        given = words(command, trained, trained / "web", tmp_path / "x")
        given[1] = str(contrast)
        assert wanted in call(MODULE, *given, code=2).stderr


def test_another_call_with_other_settings_does_not_go_on(trained, tmp_path):
    given = words("caption", trained, trained / "web", tmp_path / "T")
    progress = tmp_path / "T.partial" / ".progress"
    progress.mkdir(parents=True)
    (progress / "plan.json").write_text('{"items": 6, "items_per_shard": 1, "digest": "another"}')
    assert "was begun with other input or settings" in call(MODULE, *given, code=2).stderr
    assert progress.exists()


def test_the_truth_of_the_world():
    scene = (Thing("circle", "red", "large", "plain", 0, 0), Thing("square", "blue", "small", "plain", 2, 2))
    assert is_true("a red circle in the top left corner", scene)
    assert not is_true("a red circle in the middle", scene) and not is_true("a green circle", scene)
    assert not is_true("a picture", scene)
    tally = Tally(seen=Counter(web=10, human=2, synthetic=3))
    judged = {"right kept": 6, "wrong kept": 1, "right dropped": 1, "wrong dropped": 2}
    tally.judged.update({f"web {name}": count for name, count in judged.items()} | {"human right kept": 2})
    assert tally.truth() == {
        "web": pytest.approx({"right before": 70.0, "right after": 600 / 7, "precision": 200 / 3, "recall": 200 / 3}),
        "human": {"right before": 100.0, "right after": 100.0},
    }
    assert Caption("a", "web").entry() == {"caption": "a", "source": "web"}


def test_what_a_filter_left_out_counts_as_left_out_when_captions_are_added(trained, made, tmp_path):
    """Also where the set that is captioned has been filtered."""
    _, filtered, _ = made
    call(MODULE, *words("caption", trained, filtered, tmp_path / "again"))
    before, after = (json.loads((f / "capfilt.json").read_text()) for f in (filtered, tmp_path / "again"))
    entries = [c for raw in read(filtered) for c in captions_of(raw, "web") if c.source == "web"]
    dropped = sum(not c.kept for c in entries)
    assert dropped > 0 and after["kept"]["web"] == before["kept"]["web"] == len(entries) - dropped
    judged = after["judged"]
    assert judged.get("web right dropped", 0) + judged.get("web wrong dropped", 0) == dropped
