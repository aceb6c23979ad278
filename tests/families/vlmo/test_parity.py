import pytest
import torch
from conftest import golden

from vlmo_ds.families.vlmo.parity import compare, compare_resized


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["vlmo_A.pt", "vlmo_B.pt"])
def test_features_losses_and_gradients_equal_the_reference(name, dtype):
    recorded = torch.load(golden(name), weights_only=True)
    results = list(compare(recorded, dtype))
    assert len(results) > 500
    assert [(quantity, difference) for quantity, difference, bar in results if not difference <= bar] == []


def test_a_wrong_weight_is_noticed():
    recorded = torch.load(golden("vlmo_A.pt"), weights_only=True)
    table = recorded["state_dict"]["relative_position_bias_table"]
    recorded["state_dict"]["relative_position_bias_table"] = table.roll(1, 0)
    failed = [quantity for quantity, difference, bar in compare(recorded, torch.float64) if not difference <= bar]
    assert "infer.text_feats" in failed and "losses.itc (weight 1)" in failed


@pytest.mark.parametrize("name", ["vlmo_resize_A.pt", "vlmo_resize_B.pt"])
def test_weights_fit_another_image_size_as_in_the_reference(name):
    results = list(compare_resized(torch.load(golden(name), weights_only=True), torch.float32))
    assert [(quantity, difference) for quantity, difference, bar in results if not difference <= bar] == []
