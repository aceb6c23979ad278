"""Runs on captions in several scripts, whose word pieces are pairs of bytes."""

import json

from conftest import run_ranks, tiny_recipe, write_yaml
from data.files import jpeg, write_tar

from vlmo_ds.data.tokenizer import load_tokenizer

CAPTIONS = ("赤い丸が青い四角の上にある", "دائرة حمراء فوق مربع أزرق", "नीले वर्ग के ऊपर लाल वृत्त", "วงกลมสีแดง")


def test_a_run_learns_pieces_of_every_script_and_is_scored(tmp_path):
    members = {}
    for i in range(32):
        captions = [f"{caption} {i}" for caption in CAPTIONS]
        members |= {
            f"{i}.jpg": jpeg((32, 32), (i * 7, 200 - i, 90)),
            f"{i}.json": json.dumps({"captions": captions}).encode(),
        }
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", members)
    recipe = tiny_recipe(tmp_path)
    recipe["stages"] = recipe["stages"][2:]
    del recipe["stages"][0]["init"]
    recipe["tokenizer"] = {"name": "train", "kind": "byte_bpe", "vocab_size": 330}
    command = ["train_ds.py", "--recipe", str(write_yaml(tmp_path / "recipe.yaml", recipe))]
    run_ranks([*command, "--output_dir", str(tmp_path / "run")], 1)
    tokenizer = load_tokenizer(str(tmp_path / "run/tokenizer"))
    assert len(tokenizer) == 330
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption and len(ids) < 2 + len(caption.encode())
    assert "text_to_image" in json.loads((tmp_path / "run/retrieval.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(0 < row["loss/mlm"] < 10 for row in rows)
