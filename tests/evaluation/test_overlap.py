from conftest import call, tiny_recipe, write_yaml

from vlmo_ds.data.shards import list_shards
from vlmo_ds.evaluation.overlap import overlap


def test_pictures_of_both_sets_are_counted(synthetic):
    train, test = (list_shards([str(synthetic / name)]) for name in ("train", "test"))
    assert overlap(test, train) == (0, 24)
    assert overlap(train[:1], train) == (32, 32) and overlap([*test, *train[1:2]], train) == (32, 56)
    text = list_shards([str(synthetic / "text")])
    assert overlap(test, text) == (0, 24) and overlap(text, train) == (0, 0)


def test_a_run_warns_of_them(tmp_path, synthetic):
    recipe = tiny_recipe(synthetic)
    recipe["stages"] = [recipe["stages"][-1] | {"steps": 1, "init": {"weights": "fresh"}}]
    recipe["retrieval"]["shards"] = [str(synthetic / "train")]
    file = write_yaml(tmp_path / "recipe.yaml", recipe)
    done = call("vlmo_ds.training.command", "--recipe", file, "--output_dir", tmp_path / "run")
    assert (
        "warning: retrieval: 64 of 64 held-out pictures that were looked at, or more, are among those that stage 'joint'"
        in done.stderr
    )
