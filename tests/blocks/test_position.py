import torch
from conftest import golden

from vlmo_ds.blocks.position import image_position_index, joint_position_index, num_distances, text_position_index


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
