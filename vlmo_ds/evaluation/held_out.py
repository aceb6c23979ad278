"""Held-out sets are checked before training: a bad sample in one must not cost a finished run its evaluation.

An evaluation measures all samples or none: where training replaces a sample that cannot be used, its number would change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vlmo_ds.config import HeldOutConfig, ModelConfig, Recipe
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.transforms import EncodedImage
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation.table import planned
from vlmo_ds.progress import progress

Reader = Callable[[Any, Any], Iterator[tuple[str, list[bytes]]]]  # as table.Evaluation.read


def check_held_out(recipe: Recipe, collector: Collector) -> None:
    """Reads all that the evaluations will read. Every rank calls, and decodes a share of the pictures.

    Raises DataError on every rank, naming the setting and the first sample that cannot be used.
    """
    for setting, evaluation in planned(recipe).items():
        config = getattr(recipe, setting)
        found = collector.each_rank(first_fault(config, recipe.model, evaluation.read, setting, collector))
        if faults := [fault for fault in found if fault]:
            raise DataError(f"{setting}: {min(faults)[1]}")


def first_fault(
    config: HeldOutConfig, model: ModelConfig, reader: Reader, setting: str, collector: Collector
) -> tuple[int, str] | None:
    """(number of the sample, what is wrong) of the first that this rank finds."""
    number = 0
    try:
        for name, pictures in progress(
            reader(config, model), f"checking {setting}", unit="samples", silent=collector.rank > 0
        ):
            heartbeat.beat(f"reading the held-out set of {setting}")
            if number % collector.world_size == collector.rank:
                for data in pictures:
                    check_picture(data, name)
            number += 1
    except ValueError as error:
        return number, str(error)
    return None


def check_picture(data: bytes, name: str) -> None:
    try:
        EncodedImage(data).decode(3)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
