"""MLflow gets what TensorBoard and metrics.jsonl have, once each, through a run that goes on; its real client and its store in SQLite."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from conftest import run_ranks, start_ranks, tiny_recipe, write_yaml

from vlmo_ds.config import RecipeError
from vlmo_ds.training import ds_config, mlflow_log
from vlmo_ds.training.ds_config import read_config
from vlmo_ds.training.mlflow_log import MLflow, key_of


def client_of(uri: str):
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package)
    tracking = pytest.importorskip("mlflow.tracking")
    return tracking.MlflowClient(tracking_uri=uri)


def arguments(folder: Path, data: Path, section: dict) -> list[str]:
    recipe = tiny_recipe(data, retrieval=None)
    recipe["stages"] = [recipe["stages"][1] | {"init": {"weights": "fresh"}, "trainable": "all"}]
    recipe["stages"][0] |= {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
    recipe["stages"][0]["evaluate"] = {"held_out": [str(data / "test")], "batches": 1}
    (folder / "ds.json").write_text(json.dumps({"mlflow": section, "steps_per_print": 10**9}))
    words = ["--recipe", write_yaml(folder / "recipe.yaml", recipe), "--deepspeed_config", folder / "ds.json"]
    return ["train_ds.py", *words, "--output_dir", folder / "run"]


def test_a_run_and_what_goes_on_from_it_are_one_run_there(tmp_path, synthetic):
    uri = f"sqlite:///{tmp_path}/store.db"
    client = client_of(uri)
    words = arguments(tmp_path, synthetic, {"enabled": True, "tracking_uri": uri, "experiment_name": "mine"})
    run_ranks(words, 2)
    for left_out in ("final", "step-00000004"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "text" / left_out)
    assert "resumed at step 2" in run_ranks(words, 1)
    run_ranks([*words, "stages.text.steps=5"], 1)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "loss/textmlm", "lr", "throughput/samples_per_second"):
        found = client.get_metric_history(run.info.run_id, f"text/{name}")
        assert [metric.step for metric in found] == [1, 2, 3, 4, 5], name
        if name in records[0]:
            assert [metric.value for metric in found] == pytest.approx([record[name] for record in records], rel=1e-5)
    held_out = client.get_metric_history(run.info.run_id, "text/held_out/loss")
    assert [metric.step for metric in held_out] == [0, 2, 4, 5]


def test_a_server_that_does_not_answer_ends_the_start_in_one_line(tmp_path, synthetic):
    words = arguments(tmp_path, synthetic, {"enabled": True, "tracking_uri": "http://127.0.0.1:9"})
    (process,) = start_ranks(words, 1, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "experiment 'vlmo_ds' cannot be opened at http://127.0.0.1:9: " in output


def test_what_cannot_be_sent_waits(tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/store.db"
    client = client_of(uri)
    monkeypatch.setattr(mlflow_log, "PAUSE", 0.05)
    mlflow = MLflow({"enabled": True, "tracking_uri": uri}, tmp_path, "name")
    send, broken = mlflow.client.log_batch, threading.Event()
    broken.set()

    def log_batch(*args, **more):
        if broken.is_set():
            raise OSError("no way there")
        send(*args, **more)

    mlflow.client.log_batch = log_batch
    mlflow.log("steps", {"a/loss": 1.0, "a/R@1": 2.0, "a/odd": float("nan")}, 1)
    mlflow.log("steps", {f"a/{number}": float(number) for number in range(2000)}, 2)
    time.sleep(0.3)
    broken.clear()
    mlflow.close(finished=False)
    assert capsys.readouterr().err.count("warning: MLflow takes no scalars (no way there); they wait") == 1
    run = client.get_run(mlflow.run_id)
    assert len(run.data.metrics) == 2002 and run.data.metrics["a/R-1"] == 2.0 and run.info.status == "KILLED"
    again = MLflow({"enabled": True, "tracking_uri": uri}, tmp_path, "name")
    again.log("steps", {"a/loss": 5.0}, 2)
    again.log("steps", {"a/loss": 3.0}, 3)
    again.close(finished=True)
    assert [one.step for one in client.get_metric_history(again.run_id, "a/loss")] == [1, 3]
    (tmp_path / mlflow_log.FILE).write_text('{"run_id": "0123"}')
    with pytest.raises(RecipeError, match=f"the run of .*{mlflow_log.FILE} cannot be opened at sqlite://"):
        MLflow({"enabled": True, "tracking_uri": uri}, tmp_path, "name")


def test_names_are_what_mlflow_takes():
    assert key_of("joint/retrieval/text_to_image/itc+itm/R@1") == "joint/retrieval/text_to_image/itc-itm/R-1"


@pytest.mark.parametrize(
    "section, words",
    [
        ({"enabled": True}, "set mlflow.tracking_uri, or MLFLOW_TRACKING_URI"),
        ({"enabled": True, "tracking_uri": "file:///x"}, "accepted: a server's http://..., or sqlite:///file.db"),
        ({"enabled": True, "tracking_uri": "mlruns"}, "'mlflow.tracking_uri' is 'mlruns'"),
        ({"enabled": "yes"}, "'mlflow.enabled'"),
        ({"enabled": True, "uri": "x"}, "'mlflow.uri' is not known"),
        ("on", "'mlflow' is 'on', expected settings such as"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, section, words):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "ds.json").write_text(json.dumps({"mlflow": section}))
    with pytest.raises(RecipeError) as told:
        read_config(tmp_path / "ds.json")
    assert words in str(told.value)


def test_a_package_that_is_not_there(tmp_path, monkeypatch):
    find = ds_config.importlib.util.find_spec
    monkeypatch.setattr(ds_config.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    (tmp_path / "ds.json").write_text(json.dumps({"mlflow": {"enabled": True, "tracking_uri": "http://x"}}))
    with pytest.raises(RecipeError, match=r'mlflow is not installed: pip install "vlmo_ds\[mlflow\]", or take'):
        read_config(tmp_path / "ds.json")
