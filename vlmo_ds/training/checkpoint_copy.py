"""A second place for a run's checkpoints and results (the setting checkpoint_copy): any file system that fsspec knows, such as s3:// or file://.

    URL/recipe.yaml, metrics.jsonl, tokenizer/ ...     what a run needs besides, as of its newest copy
    URL/checkpoints/<stage>/step-00000100/             as in the run's directory; manifest.json is written last
    URL/checkpoints/<stage>/final/, ema/, best/

Rank 0 copies in the background, from the run's own directory, which all ranks share; a copy that fails is told of, and training goes on.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import fsspec

from vlmo_ds.config import RecipeError, StageConfig
from vlmo_ds.data.storage import NEEDS_S3FS, s3fs_is_there
from vlmo_ds.distributed import heartbeat
from vlmo_ds.manifest import MANIFEST, fault_of, listed
from vlmo_ds.training import checkpoint
from vlmo_ds.weights_file import FINAL, RESULTS

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci"}
TOKENIZER, CHECKPOINTS = "tokenizer", "checkpoints"


class Copies:
    """The copies of a run, on rank 0. folder: the run's; files: of it, that are copied beside checkpoints; keep: checkpoints of a stage.

    RecipeError where the URL cannot be written to, before anything is trained.
    """

    def __init__(self, url: str, folder: Path, files: Sequence[str], keep: int):
        self.url, self.folder, self.files, self.keep = url.rstrip("/"), folder, files, keep
        self.thread: threading.Thread | None = None
        self.problem = ""
        if self.url.startswith(("s3://", "s3a://")) and not s3fs_is_there():
            raise RecipeError(f"checkpoint_copy: {url} is of an object store, which {NEEDS_S3FS}")
        try:
            self.fs, self.root = fsspec.url_to_fs(self.url)
            probe = f"{self.root}/.{uuid.uuid4().hex}"
            self.make_folder(self.root)
            self.fs.pipe_file(probe, b"written at the start of a run")
            self.fs.rm_file(probe)
        except Exception as error:  # each file system has its own
            raise RecipeError(f"checkpoint_copy: {url} cannot be written to: {in_a_line(error)}") from None

    # ---- to it ----

    def begin(self, path: Path) -> None:
        """Begins to copy a checkpoint. One that comes while another is copied is left out."""
        if self.thread is not None and self.thread.is_alive():
            self.tell(
                f"{path} is not copied to {self.url}: the copy before it is not done; checkpoints come faster than it writes"
            )
            return
        self.finish()
        self.thread = threading.Thread(target=self.copy, args=(path,))
        self.thread.start()

    def finish(self) -> None:
        """Waits for the copy that has begun, and tells why it failed."""
        if self.thread is not None:
            while self.thread.is_alive():
                heartbeat.beat("copying a checkpoint")
                self.thread.join(1.0)
        if self.problem:
            self.tell(self.problem)
        self.thread, self.problem = None, ""

    def publish(self, path: Path) -> None:
        """Copies a result, and waits for it."""
        self.finish()
        self.begin(path)
        self.finish()

    def tell(self, problem: str) -> None:
        print(f"warning: {problem}; training goes on", file=sys.stderr, flush=True)

    def copy(self, path: Path) -> None:
        """A folder with a manifest, which comes last; then what the run needs besides; then copies that are too old go."""
        target = self.there(path)
        try:
            names = list(listed(path))
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{target}/{MANIFEST}")  # what is replaced is not whole any more
            for name in names:
                self.put(path / name, f"{target}/{name}")
            for file in self.small_files():
                self.put(file, f"{self.root}/{file.relative_to(self.folder).as_posix()}")
            self.put(path / MANIFEST, f"{target}/{MANIFEST}")
            if path.name not in RESULTS:
                for old in self.steps(path.parent.name)[: -self.keep]:
                    self.fs.rm(f"{self.root}/{CHECKPOINTS}/{path.parent.name}/{old}", recursive=True)
        except Exception as error:
            self.problem = f"{path} is not copied to {self.url}: {in_a_line(error)}"

    def put(self, source: Path, target: str) -> None:
        """OSError where what is there afterwards is not as long."""
        self.make_folder(target.rpartition("/")[0])
        size = source.stat().st_size
        self.fs.put_file(str(source), target)
        self.fs.invalidate_cache()
        found = self.fs.info(target)["size"]
        if found < size or (found > size and source.suffix != ".jsonl"):  # these grow
            raise OSError(f"{target} has {found} bytes, {size} were written")

    def make_folder(self, path: str) -> None:
        """Object stores have none, and would make a bucket."""
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        if not protocols & OBJECT_STORES:
            self.fs.makedirs(path, exist_ok=True)

    def small_files(self) -> list[Path]:
        found = [self.folder / name for name in self.files]
        tokenizer = self.folder / TOKENIZER
        return [file for file in found if file.is_file()] + (
            [f for f in tokenizer.iterdir()] if tokenizer.is_dir() else []
        )

    def there(self, path: Path) -> str:
        return f"{self.root}/{CHECKPOINTS}/{path.parent.name}/{path.name}"

    def steps(self, stage: str) -> list[str]:
        """Names of a stage's whole copies of checkpoints, oldest first."""
        return sorted(name for name in self.whole(stage) if name.startswith("step-"))

    def whole(self, stage: str) -> list[str]:
        """Names of a stage's folders that have a manifest."""
        try:
            found = self.fs.ls(f"{self.root}/{CHECKPOINTS}/{stage}", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in found]
        return [name for name in names if self.fs.exists(f"{self.root}/{CHECKPOINTS}/{stage}/{name}/{MANIFEST}")]

    # ---- from it ----

    def restore(self, stages: Sequence[StageConfig]) -> None:
        """Brings back what the run's directory lacks: its small files, results of stages, and of each other stage the newest checkpoint if
        that is newer than its own. RecipeError where a copy cannot be read."""
        try:
            if not (self.folder / "recipe.yaml").exists() and self.fs.exists(f"{self.root}/recipe.yaml"):
                self.restore_run()
            for stage in stages:
                self.restore_stage(self.folder / CHECKPOINTS / stage.name)
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(f"checkpoint_copy: {self.url} cannot be read: {in_a_line(error)}") from None

    def restore_run(self) -> None:
        tokenizer = f"{self.root}/{TOKENIZER}"
        if self.fs.exists(tokenizer) and not (self.folder / TOKENIZER).exists():
            temporary = self.folder / f"{TOKENIZER}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for path in self.fs.ls(tokenizer, detail=False):
                self.get(path, temporary / path.rpartition("/")[2])
            temporary.replace(self.folder / TOKENIZER)
        for name in reversed(self.files):  # recipe.yaml, the first, comes last: the others are there then
            if self.fs.exists(f"{self.root}/{name}"):
                self.get(f"{self.root}/{name}", self.folder / f".{name}.copy.tmp")
                (self.folder / f".{name}.copy.tmp").replace(self.folder / name)
        print(f"{self.folder}: files of the run brought back from {self.url}", flush=True)

    def restore_stage(self, folder: Path) -> None:
        if (folder / FINAL).exists():
            return
        there = self.whole(folder.name)
        if FINAL in there:
            wanted = [name for name in RESULTS if name in there and name != FINAL] + [FINAL]
        else:
            steps = sorted(name for name in there if name.startswith("step-"))
            own = [path.name for path in checkpoint.list_checkpoints(folder) if not fault_of(path)]
            wanted = steps[-1:] if steps and steps[-1] > max(own, default="") else []
        for name in wanted:
            if not (folder / name).exists() or fault_of(folder / name):
                self.get_folder(folder / name)

    def get_folder(self, path: Path) -> None:
        source, temporary = self.there(path), path.with_name(path.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.get(f"{source}/{MANIFEST}", temporary / MANIFEST)
        for name in listed(temporary):
            self.get(f"{source}/{name}", temporary / name)
        if fault := fault_of(temporary, (0, 1)):
            raise RecipeError(
                f"checkpoint_copy: {self.url}/{CHECKPOINTS}/{path.parent.name}/{path.name} is damaged: {fault}"
            )
        if path.exists():
            checkpoint.set_aside(path, "damaged")
        temporary.replace(path)
        print(f"{path}: brought back from {self.url}", flush=True)

    def get(self, source: str, target: Path) -> None:
        heartbeat.beat("bringing back a copy")
        self.fs.get_file(source, str(target))


def in_a_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return f"{words[:300]} ({type(error).__name__})"
