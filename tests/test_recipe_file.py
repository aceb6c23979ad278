"""Reading recipes: mistakes and attacks end in a second, in words."""

import random
import time

import pytest
import yaml
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import RecipeError
from vlmo_ds.families import FAMILIES
from vlmo_ds.recipe import every_setting, explanation
from vlmo_ds.recipe_file import load_recipe, read_yaml
from vlmo_ds.shipped import names

RECIPE = FAMILIES["vlmo"].recipe

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "stands for more than 50,000 values"),
        ("a: " + "[" * 20_000 + "]" * 20_000, "has more than 50 lists or settings inside one another"),
        ("{" * 20_000, "has more than 50 lists or settings inside one another"),
        ("a: &a [*a]", r"line 1: '\*a' is inside of what it stands for"),
        ("a: 1\nb: 2\na: 3", r"has the setting 'a' twice \(line 3\)"),
        ("x: " + "a" * (1 << 20), r"has 1,048,579 bytes, at most 1,048,576 are read"),
        ("a: !!python/object/apply:os.system ['ls']", "is not valid YAML: could not determine a constructor"),
        ("a: 2020-99-99", "is not valid YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("a: *b", "is not valid YAML: found undefined alias"),
    ],
)
def test_yaml_that_is_refused_in_a_second(text, message):
    began = time.process_time()
    with pytest.raises(RecipeError, match=f"^recipe r.yaml:? ?{message}"):
        read_yaml(text.encode(), "recipe r.yaml")
    assert time.process_time() - began < 2


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="r is not UTF-8 text"):
        read_yaml(b"a: \xff", "r")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_anchors_and_merges_are_taken():
    assert read_yaml(b"a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", "r") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


def mutated(text: str, rng: random.Random) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.randrange(1, 30)]
        elif what == 2:
            data[at:at] = rng.choice(
                [b"[", b"{", b"&a ", b"*a", b": ", b"- ", b"null", b"1e999", b".nan", b"-1", b"\n", b"''", b"\t"]
            )
        else:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
    return bytes(data)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutated_recipe_files(tmp_path, count):
    """A recipe or a RecipeError, whatever the file holds; the settings themselves are mutated in tests/data/test_fuzz.py."""
    rng, file = random.Random(0), tmp_path / "r.yaml"
    texts = [yaml.safe_dump(tiny_recipe(ROOT), sort_keys=False), (ROOT / "launch/recipes/mixture.yaml").read_text()]
    for number in range(count):
        file.write_bytes(mutated(texts[number % 2], rng))
        try:
            load_recipe(file)
        except RecipeError:
            continue


def test_every_recipe_that_is_shipped_is_found_by_name():
    for name in names("recipes"):
        assert load_recipe(name) == load_recipe(ROOT / "launch/recipes" / f"{name}.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "model.family=vlmoo",
            r"recipe quickstart:\n  model.family is 'vlmoo' \(did you mean 'vlmo'\?\); accepted: vlmo",
        ),
        ("model.family=[vlmo]", r"recipe quickstart:\n  model.family is \['vlmo'\]"),
        ("model.arch=[1]", r"model.arch: Input should be 'custom', .*\(found \[1\]\)"),
        ("model.arch={a: 1}", "model.arch: Input should be 'custom'"),
        ("model=3", "model: "),
        ("model.activation_checkpoint_every=[1]", r"model.recompute: accepted: none, cheap, .*\(found \[1\]\)"),
        ("model.activation_checkpoint_every=true", r"model.recompute: "),
        ("model.recompute=0", r"model.recompute: accepted: none, cheap, blocks, or a whole number .*\(found 0\)"),
    ],
)
def test_a_family_that_there_is_not(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize("before, after", [(0, "cheap"), (1, "blocks"), (3, 3)])
def test_the_former_name_of_recompute_is_read(before, after):
    recipe = load_recipe("quickstart", [f"model.activation_checkpoint_every={before}"])
    assert recipe.model.recompute == after and "activation_checkpoint_every" not in recipe.model.model_dump()


def test_every_setting_is_explained():
    for family in FAMILIES.values():
        assert not [name for name, _, _, meaning in every_setting(family.recipe) if not meaning], family.name
    text = explanation([], RECIPE)
    assert "stages.<name>.optimizer.lr  (number; 0.0002)\n    peak learning rate" in text
    assert "retrieval.rerank  (int; 16)" in text and "stages.<name>.data.sources.<name>.weight" in text
    assert "optimizer.betas  ([number, number]; [0.9, 0.98])" in text and "metadata" not in text
    assert explanation(["model.attention"], RECIPE).count("\n") == 1
    with pytest.raises(RecipeError, match="no setting begins with modle"):
        explanation(["modle"], RECIPE)
