"""Learning-rate schedules."""

import pytest
import torch
from conftest import ROOT, tiny_recipe

from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training.optim import learning_rate


def rates(steps: int, **schedule) -> list[float]:
    """Of every step, the peak being 1."""
    recipe = tiny_recipe(ROOT)
    recipe["stages"][2] |= {"steps": steps, "schedule": schedule, "optimizer": {"lr": 1.0}}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = learning_rate(optimizer, parse_recipe(recipe, "test").stages[2])
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_decay_by_steps_after_the_warm_up():
    assert rates(8, name="step", decay=0.5, decay_every=3, warmup_steps=2) == [0, 0.5, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_decay_to_the_end():
    assert rates(6, name="linear", warmup_steps=2) == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates(4, name="cosine", warmup_steps=0) == pytest.approx([1, 0.854, 0.5, 0.146], abs=1e-3)
    assert rates(4, name="constant", warmup_steps=2) == [0, 0.5, 1, 1]
