import pytest
import torch
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.blocks.heads import MIMHead
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.objectives.itc import scale_of
from vlmo_ds.objectives.mim import NormalizedPixels, mim_loss


def test_mim_counts_masked_patches_only():
    g = torch.Generator().manual_seed(0)
    image, mask = torch.rand(2, 3, 32, 32, generator=g), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3] = mask[1, 15] = True
    target = NormalizedPixels(8)
    patch = image[0, :, 0:8, 24:32].reshape(-1)  # patch 3: first row, last column; channels first, as the target says
    expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(target.target(image)[0, 3], expected)
    tokens, head = torch.randn(2, 17, 192, generator=g), MIMHead(192, 192)
    prediction = head(tokens, mask)
    torch.testing.assert_close(prediction, head.fc(torch.stack((tokens[0, 4], tokens[1, 16]))))
    loss, _ = mim_loss(torch.zeros_like(prediction), image, mask, target, Collector())
    torch.testing.assert_close(
        loss, torch.stack([target.target(image)[i, j].square().mean() for i, j in ((0, 3), (1, 15))]).mean()
    )


@pytest.mark.parametrize("visible_only", [False, True])
def test_masked_patches_hide_their_pixels(visible_only):
    model, batch = tiny_model({"mim": 1.0}, mim_visible_only=visible_only), tiny_batch()
    model.mim_target = type(
        "Target", (), {"target": lambda s, i: torch.zeros(len(i), 16, 192), "loss": lambda s, p, t: p.square().mean(-1)}
    )()
    before = float(model(batch).loss)
    hidden = (
        batch["image_mask"][:, :, None]
        .expand(-1, -1, 64)
        .reshape(5, 4, 4, 8, 8)
        .permute(0, 1, 3, 2, 4)
        .reshape(5, 1, 32, 32)
    )
    batch["image"] = torch.where(hidden, torch.zeros_like(batch["image"]), batch["image"])
    assert float(model(batch).loss) == pytest.approx(before, rel=1e-12)
    batch["image"] = torch.zeros_like(batch["image"])
    assert float(model(batch).loss) != pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("log_scale, value", [(2.0, 7.389056), (4.0, 54.59815), (9.0, 100.0)])
def test_the_scale_stops_at_100_and_can_come_back(log_scale, value):
    parameter = torch.tensor(log_scale, requires_grad=True)
    scale = scale_of(parameter, torch.eye(2))
    assert float(scale) == pytest.approx(value, rel=1e-5)
    scale.backward()
    assert float(parameter.grad) == pytest.approx(value, rel=1e-5)


def test_contrast_is_float32_in_half_precision():
    model = tiny_model(dtype=torch.bfloat16)
    features = model({"image": tiny_batch(dtype=torch.bfloat16)["image"]}, "encode_image")
    assert features["image"].dtype == torch.float32
    torch.testing.assert_close(features["image"].norm(dim=1), torch.ones(5))
    losses = model(tiny_batch(dtype=torch.bfloat16)).losses
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_weights_scale_the_losses():
    batch = tiny_batch()
    one, two = tiny_model({"mlm": 1.0, "itc": 1.0})(batch).losses, tiny_model({"mlm": 0.5, "itc": 3.0})(batch).losses
    assert float(two["mlm"]) == pytest.approx(0.5 * float(one["mlm"]))
    assert float(two["itc"]) == pytest.approx(3.0 * float(one["itc"]))
