import pytest
import torch
from conftest import golden

from vlmo_ds.blocks.position import (
    begin_positions,
    image_position_index,
    joint_position_index,
    num_distances,
    text_position_index,
)


def test_indices_equal_the_recorded_ones():
    recorded = torch.load(golden("vlmo_A.pt"), weights_only=True)
    config, index = recorded["config"], recorded["relative_position_index"]
    window = config["image_size"] // config["patch_size"]
    length, longest = config["max_text_len"], config["max_text_len_of_initckpt"]
    assert torch.equal(image_position_index(window), index["image"].long())
    assert torch.equal(text_position_index(window, length, longest), index["text"].long())
    assert torch.equal(joint_position_index(window, length, longest), index["text_image"].long())


def test_joint_index_holds_the_two_others_and_stays_in_the_table():
    window, length, longest = 5, 9, 16
    joint = joint_position_index(window, length, longest)
    assert torch.equal(joint[:length, :length], text_position_index(window, length, longest))
    assert torch.equal(joint[length:, length:], image_position_index(window))
    assert joint.min() == 0 and joint.max() == num_distances(window, longest) - 1


def test_a_shorter_text_is_a_corner_of_a_longer_one():
    assert torch.equal(text_position_index(4, 6, 20), text_position_index(4, 12, 20)[:6, :6])


def test_sines_and_cosines_tell_what_is_near():
    positions = torch.full((1, 26, 16), 9.0)
    begin_positions(positions, "sincos", 0.5)
    assert bool((positions[0, 0] == 0).all())
    grid = positions[0, 1:].view(5, 5, 16)
    torch.testing.assert_close(grid.square().mean(-1), torch.full((5, 5), 0.25))
    assert torch.equal(grid[2, 0, 8:], grid[4, 0, 8:]) and torch.equal(grid[0, 2, :8], grid[0, 4, :8])  # column, row
    away = (grid - grid[2, 2]).square().sum(-1)
    assert away[2, 3] == pytest.approx(float(away[2, 1])) == pytest.approx(float(away[1, 2]))
    assert away[2, 2] == 0 < away[2, 3] < away[2, 4] < away[4, 4]
