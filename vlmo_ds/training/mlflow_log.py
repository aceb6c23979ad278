"""A run's scalars in MLflow, by the names that TensorBoard has. DeepSpeed's monitors know no MLflow; the section `mlflow` of the DeepSpeed config
is this project's own.

Nothing here is imported unless it is asked for; the package is the extra `mlflow`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmo_ds.config import RecipeError
from vlmo_ds.data.storage import write_atomically

FILE = "mlflow.json"  # in the run's directory: which MLflow run it is
URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "vlmo_ds"  # MLflow's variable; the experiment of a config that names none
LOGGED = "vlmo_ds.logged."  # tags: of each kind of scalars the last step that is there
MOST = 900  # scalars in a request; MLflow takes 1000
PATIENCE, PAUSE = 30.0, 5.0  # seconds for what waits at the end, and between two tries


class MLflow:
    """Rank 0's. Scalars are sent by a thread: a server that does not answer holds up no step, and what it lacks waits."""

    def __init__(self, section: Mapping[str, Any], folder: Path, name: str):
        """Opens the MLflow run of a run's directory, or makes it, by the section of the DeepSpeed config; name: the recipe's. RecipeError where
        that cannot be."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its seven take minutes
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.file, uri = folder / FILE, uri_of(section)
        experiment = section.get("experiment_name", EXPERIMENT)
        try:
            self.client = MlflowClient(tracking_uri=uri)
            known = json.loads(self.file.read_text())["run_id"] if self.file.exists() else None
            self.run_id = known or self.begun(experiment, section.get("run_name", name), uri)
            self.client.update_run(self.run_id, status="RUNNING")
            tags = self.client.get_run(self.run_id).data.tags
        except (MlflowException, OSError, ValueError, KeyError, TypeError) as error:
            about = f"the run of {self.file}" if self.file.exists() else f"experiment '{experiment}'"
            raise RecipeError(
                f"the DeepSpeed config asks for MLflow, and {about} cannot be opened at {uri}: {str(error).splitlines()[0][:300]}"
            ) from None
        self.logged = {key.removeprefix(LOGGED): int(v) for key, v in tags.items() if key.startswith(LOGGED)}
        self.waiting: queue.SimpleQueue[tuple[str, dict[str, float], int, int] | None] = queue.SimpleQueue()
        self.told = False
        self.ending: float | None = None
        self.thread = threading.Thread(target=self.send_all, daemon=True)
        self.thread.start()

    def begun(self, experiment: str, name: str, uri: str) -> str:
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = self.client.create_run(number, run_name=name).info.run_id
        write_atomically(self.file, json.dumps({"run_id": run_id, "tracking_uri": uri}).encode())
        return run_id

    def log(self, kind: str, scalars: Mapping[str, float], step: int) -> None:
        """step: of the run. A step that MLflow has of this kind of scalars is not sent again."""
        if step <= self.logged.get(kind, -1):
            return
        self.logged[kind] = step
        finite = {key_of(name): value for name, value in scalars.items() if math.isfinite(value)}
        self.waiting.put((kind, finite, step, round(time.time() * 1000)))

    def send_all(self) -> None:
        while (one := self.waiting.get()) is not None:
            while not self.sent(*one):
                if self.ending is not None and time.monotonic() > self.ending:
                    return
                time.sleep(PAUSE)

    def sent(self, kind: str, scalars: dict[str, float], step: int, at: int) -> bool:
        from mlflow.entities import Metric, RunTag

        values = [Metric(name, value, at, step) for name, value in scalars.items()]
        try:
            for start in range(0, len(values), MOST):
                last = start + MOST >= len(values)
                tags = [RunTag(LOGGED + kind, str(step))] if last else []
                self.client.log_batch(self.run_id, metrics=values[start : start + MOST], tags=tags)
        except Exception as error:  # of any store's making
            if not self.told:
                self.told = True
                why = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
                print(
                    f"warning: MLflow takes no scalars ({why}); they wait, and training goes on",
                    file=sys.stderr,
                    flush=True,
                )
            return False
        self.told = False
        return True

    def close(self, *, finished: bool) -> None:
        """Waits for what is not sent yet, but not for ever."""
        self.waiting.put(None)
        self.ending = time.monotonic() + PATIENCE
        self.thread.join(PATIENCE + PAUSE)
        if self.thread.is_alive() or not self.waiting.empty():
            print(
                "warning: the last scalars have not reached MLflow; metrics.jsonl has them", file=sys.stderr, flush=True
            )
            return
        with contextlib.suppress(Exception):
            self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def uri_of(section: Mapping[str, Any]) -> str:
    """Where MLflow is; "" where nobody says."""
    return section.get("tracking_uri") or os.environ.get(URI, "")


def key_of(name: str) -> str:
    """MLflow takes letters, digits, and some signs."""
    return re.sub(r"[^\w\-. :/]", "-", name)
