"""Tables of pictures and captions as people have them."""

import json
import os
import re
import subprocess
import sys
import tracemalloc

import pytest
from conftest import ROOT
from data.files import jpeg, prepare_here, samples
from data.test_shards import server

from vlmo_ds.data.prepare import pictures
from vlmo_ds.data.prepare.pictures import id_of
from vlmo_ds.data.prepare.table import Columns, parts_of, rows_of

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


@pytest.fixture
def tree(tmp_path):
    """pictures/0.jpg, 1.jpg, 2.jpg"""
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(COLOURS):
        (tmp_path / f"pictures/{i}.jpg").write_bytes(jpeg(colour=colour))
    return tmp_path


def table(capsys, tree, *more, name: str = "t.csv", code: int = 0) -> tuple[dict, str]:
    """(captions by file, what is printed)."""
    said = prepare_here(capsys, "table", "--input", tree / name, "--output", tree / "out", *more, code=code)
    return {} if code else {s.meta["file"]: s.captions for s in samples(tree / "out")}, said


EXPECTED = {f"pictures/{i}.jpg": [caption] for i, caption in enumerate(["a red one", "green, I say", 'a "blue" one'])}


@pytest.mark.parametrize(
    "name, content, more",
    [
        ("t.csv", 'image,caption\npictures/0.jpg,a red one\npictures/1.jpg,"green, I say"\npictures/2.jpg,"a ""blue"" one"\n',
         []),
        ("t.csv", '\ufeffid;text;file\r\n1;"a red\r\none";pictures/0.jpg\r\n\r\n2;green, I say;pictures/1.jpg\r\n'
         '3;"a ""blue"" one";pictures/2.jpg', ["--image", "file", "--caption", "text"]),
        ("t.tsv", 'a red one\tpictures/0.jpg\ngreen, I say\tpictures/1.jpg\na "blue" one\tpictures/2.jpg\n',
         ["--columns", "caption,image", "--no_quotes"]),
        ("t.jsonl", "\n".join(json.dumps({"url": f, "c": c}) for f, c in EXPECTED.items()), ["--url", "url", "--caption", "c"]),
        ("t.json", json.dumps([{"image": f, "caption": c} for f, c in EXPECTED.items()], indent=1), []),
        ("t.json", "\ufeff \n[" + " ,\n".join(json.dumps({"é": f, "caption": c}, ensure_ascii=False) for f, c in EXPECTED.items())
         + "\r\n] \n", ["--image", "é"]),
        ("t.json", "\n".join(json.dumps({"image": f, "caption": c}) for f, c in EXPECTED.items()), []),
        ("t.jsonl", json.dumps([{"image": f, "caption": c} for f, c in EXPECTED.items()]), []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("per_shard", [1, 2, 100])
def test_formats(tree, capsys, name, content, more, per_shard):
    (tree / name).write_bytes(content.encode())
    found, _ = table(capsys, tree, *more, "--samples_per_shard", per_shard, name=name)
    assert found == EXPECTED
    assert len(list((tree / "out").glob("*.tar"))) == -(-3 // per_shard)


def test_parquet(tree, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "image": [{"bytes": jpeg(colour=COLOURS[0]), "path": "x.jpg"}, {"bytes": None, "path": "pictures/1.jpg"}, None],
        "caption": [["a red one"], ["green, I say"], ["none"]],
        "image_id": [7.0, None, 9.0],
    }
    parquet.write_table(pa.table(columns), tree / "t.parquet", row_group_size=2)
    for per_shard in (1, 2, 100):
        more = ["--image_id", "image_id", "--samples_per_shard", per_shard, "--overwrite"]
        found, said = table(capsys, tree, *more, name="t.parquet")
        assert found == {"x.jpg": ["a red one"], "pictures/1.jpg": ["green, I say"]} and "rejected 1: no image" in said
        assert samples(tree / "out")[0].image_id == 7


def test_rows_that_cannot_be_used_are_counted(tree, capsys):
    rows = [
        b"image,caption,id",
        b"pictures/0.jpg,fine,1",
        b"pictures/0.jpg,the same picture,1",
        b"pictures/9.jpg,missing,2",
        b"pictures/1.jpg,,3",
        b"pictures/1.jpg",
        b"pictures/1.jpg,caf\xe9,4",
        b",no picture,5",
        b"pictures,a folder,6",
        b"pipe:touch pwned,a command,7",
        b"file:///etc/passwd,a file,8",
        b"-o,an option,9",
        b"t.csv,no picture,10",
    ]
    (tree / "t.csv").write_bytes(b"\n".join(rows))
    _, said = table(capsys, tree, "--image_id", "id")
    first, second = samples(tree / "out")
    assert first.image_id == second.image_id == 1 and first.sample_id != second.sample_id
    for count, reason in [(3, "image file missing"), (1, "no caption"), (1, "row with more or fewer cells"), (1, "no image"),
                          (1, "row that is not UTF-8"), (2, "image is neither a path nor an http"),
                          (1, "image: not a readable image")]:  # fmt: skip
        assert f"rejected {count}: {reason}" in said, said
    assert not (tree / "pwned").exists()


def test_lines_that_cannot_be_used_are_counted(tree, capsys):
    lines = [
        b'{"image": "pictures/0.jpg", "caption": ["one", "two", 3, null]}',
        b"",
        b'{"image": "pictures/1.jpg", "caption": "half a pair: \\ud800"}',
        b'{"image": "pictures/1.jpg", "caption": NaN}',
        b'{"image": "pictures/1.jpg", "caption": {"a": 1}}',
        b'{"image": 7, "caption": "x"}',
        b'{"image": "a\\u0000b", "caption": "x"}',
        b"[1]",
        b"{",
        b"[" * 100_000,
        b'{"image": "pictures/1.jpg", "caption": "caf\xe9"}',
    ]
    (tree / "t.jsonl").write_bytes(b"\n".join(lines))
    found, said = table(capsys, tree, name="t.jsonl")
    assert found == {"pictures/0.jpg": ["one", "two"], "pictures/1.jpg": ["half a pair: ?"]}
    for count, reason in [(2, "no caption"), (1, "no image"), (1, "image file"), (3, "line that is no JSON object"),
                          (1, "row that is not UTF-8")]:  # fmt: skip
        assert f"rejected {count}: {reason}" in said, said


def test_entries_of_an_array_that_cannot_be_used_are_counted(tree, capsys):
    rows = [
        b'{"image": "pictures/0.jpg", "caption": "a ] , [ { \\" caf\xc3\xa9"}',
        b"[1, [2]]",
        b"7",
        b'{"image": "pictures/1.jpg", "caption": "half a pair: \\ud800"}',
        b'{"image": "pictures/1.jpg", "caption": NaN}',
        b'{"image": "pictures/1.jpg", "caption": "caf\xe9"}',
    ]
    (tree / "t.json").write_bytes(b"[" + b",\n ".join(rows) + b"]")
    for per_shard in (1, 2, 100):
        found, said = table(capsys, tree, "--samples_per_shard", per_shard, "--overwrite", name="t.json")
        assert found == {"pictures/0.jpg": ['a ] , [ { " café'], "pictures/1.jpg": ["half a pair: ?"]}
        for count, reason in [(1, "no caption"), (2, "entry that is no JSON object"), (1, "row that is not UTF-8")]:
            assert f"rejected {count}: {reason}" in said, said


def test_an_array_is_read_up_to_a_size(tree, capsys, monkeypatch):
    monkeypatch.setattr("vlmo_ds.data.prepare.table.MOST_ARRAY", 1 << 20)
    (tree / "t.json").write_bytes(b"[" + b" " * (2 << 20) + b"]")
    _, said = table(capsys, tree, name="t.json", code=2)
    assert "t.json: a JSON array of 2 MB; accepted: up to 1 MB, or any size with one object a line (jsonl)" in said


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.json", b"[]", "the first entry of its array is no JSON object"),
        ("t.json", b"[[1]]", "the first entry of its array is no JSON object"),
        ("t.json", b'[{"img": 1}]', "t.json has no column 'image'; it has 'img'"),
        ("t.json", b'[{"image": "a", "caption": "b"}', "is no whole JSON array (expected ',' or ']'"),
        ("t.json", b'[{"image": "a", "caption": "b"},]', "is no whole JSON array (Expecting value"),
        ("t.json", b'[{"image": "a", "caption": "b"}] x', "is no whole JSON array (expected nothing more"),
        ("t.json", b'[{"image": "a", "caption": "b"}, ' + b"[" * 100_000, "is no whole JSON array (maximum recursion"),
        (
            "t.json",
            b'{"images": [],\n "annotations": []}',
            "its first line is no JSON object; expected one a line, or an array",
        ),
        ("t.csv", b"", "has no column 'image'"),
        ("t.csv", b"picture,text\n1,2\n", "has no column 'image'; it has 'picture', 'text': name them with --image"),
        ("t.csv", b"image,caption,image\na,b,c\n", "two columns 'image'"),
        ("t.csv", "image,caption\n".encode("utf-16"), "is UTF-16"),
        ("t.csv", b'image,caption\na,b\nc,"not closed\ne,f\n', "quotes of a row before byte 36 do not fit"),
        ("t.csv", b"image,caption\n", "nothing to write"),
        ("t.jsonl", b"", "its first line is no JSON object"),
        ("t.jsonl", b'{"img": 1}\n', "has no column 'image'; it has 'img'"),
        ("t.parquet", b"PAR1", "is not a pyarrow file"),
        ("t.xlsx", b"", "a table is one of .csv, .tsv"),
        ("none.csv", None, "does not exist"),
    ],
)
def test_what_is_no_table(tree, capsys, name, content, message):
    if content is not None:
        (tree / name).write_bytes(content)
    assert message in table(capsys, tree, name=name, code=2)[1]


def test_urls_and_a_table_on_the_web(tree, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "FETCH_TRIES", 1)
    (tree / "served.csv").write_text("image,caption\npictures/0.jpg,relative\nhttp://127.0.0.1:1/x.jpg,gone\n")
    monkeypatch.setenv("TMPDIR", str(tree))
    with server(tree, lambda n: None) as (url, requests):
        (tree / "t.csv").write_text(f"image,caption\n{url}/pictures/0.jpg,one\n{url}/no.jpg,no\npictures/1.jpg,two\n")
        found, said = table(capsys, tree)
        assert found == {f"{url}/pictures/0.jpg": ["one"], "pictures/1.jpg": ["two"]}
        assert "rejected 1: image cannot be fetched" in said
        (tree / "t.jsonl").write_text('{"image": "2.jpg", "caption": "three"}')
        found, _ = table(capsys, tree, "--root", f"{url}/pictures", "--overwrite", name="t.jsonl")
        assert found == {"2.jpg": ["three"]} and requests[-1] == "/pictures/2.jpg"
        prepare_here(capsys, "table", "--input", f"{url}/served.csv", "--output", tree / "web")
        assert samples(tree / "web")[0].captions == ["relative"]


def test_a_large_table_is_not_held_in_memory(tmp_path):
    with open(tmp_path / "t.csv", "w") as file:
        file.write("image,caption\n")
        file.writelines(f"pictures/{i}.jpg,a picture of number {i}\n" for i in range(200_000))
    columns = Columns("image", "caption")
    tracemalloc.start()
    parts = list(parts_of(str(tmp_path / "t.csv"), columns, 1000))
    rows = list(rows_of(parts[150], columns))
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    assert len(parts) == 200 and rows[7] == {"image": "pictures/150007.jpg", "caption": "a picture of number 150007"}


@pytest.mark.parametrize(
    "value, found",
    [(7, 7), ("7", 7), ("007", "007"), ("-3", -3), (42.0, 42), (1.5, None), (float("nan"), None), (True, None), (None, None),
     ("", None), ("a.jpg", "a.jpg"), (1 << 70, str(1 << 70)), ("--5", "--5"), ("٣", "٣"), ([1], None), ("9" * 30, "9" * 30)],
)  # fmt: skip
def test_ids(value, found):
    assert id_of(value) == found and type(id_of(value)) is type(found)


def test_csv_needs_no_pyarrow(tree):
    (tree / "t.csv").write_text("image,caption\npictures/0.jpg,one\n")
    (tree / "pyarrow").mkdir()
    (tree / "pyarrow/__init__.py").write_text("raise ImportError('not installed')")
    arguments = ["-m", "vlmo_ds.data.prepare", "table", "--output", "out", "--processes", "1", "--input"]
    env = {**os.environ, "PYTHONPATH": f"{tree}:{ROOT}"}
    done = [
        subprocess.run([sys.executable, *arguments, name], cwd=tree, env=env, capture_output=True, text=True)
        for name in ("t.csv", "t.parquet")
        if (tree / name).touch() is None
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 2 and "need pyarrow: pip install 'vlmo_ds[arrow]'" in done[1].stderr


@pytest.mark.long
def test_the_documented_way_from_a_csv_to_a_trained_step(tmp_path):
    """The lines of docs/data.md as they stand, in an empty folder."""
    text = (ROOT / "docs/data.md").read_text()
    part = text[text.index("## From a csv of 100 rows") : text.index("## Datasets")]
    for name in ("train_ds.py", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = "set -e\n" + "\n".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "100 samples, 100 captions" in done.stdout and (tmp_path / "mine/page.html").exists()
    assert (tmp_path / "mine/run/metrics.jsonl").read_text().count("\n") == 1
