"""The page about a shard set."""

import subprocess
import sys

from conftest import ROOT
from data.files import jpeg, write_pairs, write_tar


def inspect(*arguments, code=0):
    command = [sys.executable, "-m", "vlmo_ds.data.inspect", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_page_counts_and_shows(tmp_path):
    same = jpeg((64, 48), (9, 99, 9))
    write_pairs(
        tmp_path / "a.tar", 10, s003_jpg=b"", s004_jpg=same, s005_jpg=same, s006_txt=b"<b>bold</b> claim & more"
    )
    write_tar(tmp_path / "b.tar", {"x.txt": b"a line of text alone"})
    inspect(tmp_path, "--output", tmp_path / "page.html", "--image_size", 64)
    page = (tmp_path / "page.html").read_text()
    for fact in (
        "<td>samples</td><td>11</td>",
        "<td>of these unusable</td><td>1</td>",
        "<td>captions</td><td>10</td>",
        "<td>pictures that look like an earlier one</td><td>1</td>",
        "2 times: a.tar:4, a.tar:5",
        "a.tar, sample 3: not a readable image",
    ):
        assert fact in page, fact
    assert page.count("data:image/jpeg") == 9 + 1 and page.count("&rarr;") >= 9  # 9 pictures and one group of copies
    assert "<b>bold</b>" not in page


def test_nothing_to_inspect(tmp_path):
    assert "does not exist" in inspect(tmp_path / "no", "--output", tmp_path / "page.html", code=2).stderr
    assert not (tmp_path / "page.html").exists()
