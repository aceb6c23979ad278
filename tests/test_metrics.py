"""metrics.jsonl after kills, power cuts and full disks: repaired, never shortened below what is finished."""

import json
import os
import random
import time

import pytest

from vlmo_ds import metrics
from vlmo_ds.metrics import AppendedFile, begin_stage, dump, place_of


def line(stage: str, step: int, number: int, **values) -> bytes:
    return dump({"stage": stage, "step": step, "step_of_run": number, "loss": 0.5, **values})


def run_of(*stages: str, steps: int = 4) -> list[bytes]:
    return [line(s, i + 1, n * steps + i + 1) for n, s in enumerate(stages) for i in range(steps)]


def test_lines_past_a_step_of_the_stage_are_cut_and_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert begin_stage(path, "a", 0) == (0, [])
    lines = run_of("a", "b", "c")
    path.write_bytes(b"".join(lines))
    assert begin_stage(path, "c", 2) == (10, [])
    assert path.read_bytes() == b"".join(lines[:10])
    assert begin_stage(path, "a", 1)[0] == 10  # b and c have been trained already
    assert path.read_bytes() == b"".join([lines[0], *lines[4:10]])


@pytest.mark.parametrize(
    "rest",
    [
        b'{"stage": "b", "step": 3, "st',
        b"\0" * 512,
        b"\n",
        b"\xff\xfe\n",
        b'{"stage": "b"}\n',
        b"[1]\n",
        b"null\n",
        b"{" * 9999,
    ],
)
def test_what_is_no_record_is_taken_out(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    lines = run_of("a", "b")
    path.write_bytes(b"".join(lines) + rest)
    last, notes = begin_stage(path, "b", 4)
    assert (last, notes, path.read_bytes()) == (8, [], b"".join(lines))
    path.write_bytes(b"".join(lines[:3]) + rest + b"\n" + b"".join(lines[3:]) + rest)
    last, notes = begin_stage(path, "b", 4)
    assert last == 8 and path.read_bytes() == b"".join(lines)
    assert "lines are no records and are taken out; the file as it was is" in notes[0]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes().count(rest) >= 2 - (rest == b"\n")


def test_mutated_files_are_read_or_repaired(tmp_path):
    """Whole lines of other stages are what is left, whatever happened to the others."""
    rng, path = random.Random(0), tmp_path / "metrics.jsonl"
    lines = run_of("a", "b")
    for _ in range(300):
        data = bytearray(b"".join(lines))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            what = rng.randrange(4)
            if what == 0:
                data[at : at + rng.randrange(1, 40)] = bytes(rng.randrange(1, 40))
            elif what == 1:
                data[at] = rng.randrange(256)
            elif what == 2:
                del data[at : at + rng.randrange(1, 300)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
        path.write_bytes(data)
        intact = [one for one in data.splitlines(keepends=True) if one in lines and b'"a"' in one]
        begin_stage(path, "b", 2)
        left = path.read_bytes().splitlines(keepends=True)
        assert all(place_of(one) for one in left)
        assert [one for one in left if one in lines and b'"a"' in one] == intact
        list(metrics.records(path))


def test_a_long_file_is_read_in_a_second(tmp_path):
    """Not a measurement: parsing each line takes six times as long."""
    path = tmp_path / "metrics.jsonl"
    values = {f"m{i}": 0.123456789 * i for i in range(12)}
    path.write_bytes(b"".join(line("a", i, i, **values) for i in range(1, 100_001)))
    began = time.process_time()
    assert begin_stage(path, "a", 99_999) == (99_999, [])
    looked = time.process_time() - began
    began = time.process_time()
    assert sum(1 for one in path.read_bytes().splitlines() if json.loads(one)) == 99_999
    assert looked < time.process_time() - began


def test_records_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    file = AppendedFile(path)
    file.append(b"one\n")
    real, room = os.write, [6]

    def write(handle: int, data: bytes) -> int:
        if len(data) > room[0]:
            return real(handle, data[: room[0]])
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    file.append(b"two of them\n")
    file.append(b"three\n")
    assert file.problem == "No space left on device" and path.read_bytes() == b"one\n"
    room[0] = 1000
    file.append(b"four\n")
    assert not file.problem and path.read_bytes() == b"one\ntwo of them\nthree\nfour\n"
    room[0] = 0
    file.append(b"five\n")
    with pytest.raises(OSError, match="1 records could not be written: No space left on device"):
        file.close()
