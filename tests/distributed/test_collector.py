"""The number of ranks is not a hyperparameter: 1, 2 and 4 real processes give the same losses, gradients and negatives."""

import json
import sys

import pytest
import torch
from conftest import run_ranks
from families.vlmo.tiny import tiny_batch, tiny_model

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.measuring import OneOfMany
from vlmo_ds.distributed.rows import Draw, contrast, gumbel_noise, sample_negatives, sigmoid_contrast
from vlmo_ds.objectives.itc import keys_of
from vlmo_ds.objectives.itm import draws_of

GLOBAL = 8
KINDS = {
    "plain": {},
    "positives": {"positives": "image"},
    "sigmoid": {"itc_kind": "sigmoid"},
    "sigmoid, positives": {"itc_kind": "sigmoid", "positives": "image"},
}


def worker(output: str) -> None:
    """One rank of the tests below: its part of the global batch through the collector and the whole model."""
    torch.distributed.init_process_group("gloo")
    collector = Collector()
    part = slice(collector.rank * GLOBAL // collector.world_size, (collector.rank + 1) * GLOBAL // collector.world_size)
    torch.manual_seed(5)
    table, ids = torch.randn(GLOBAL, 3, dtype=torch.float64), torch.arange(GLOBAL * 2).view(GLOBAL, 2)
    weights = torch.randn(GLOBAL, GLOBAL, 3, dtype=torch.float64)
    wanted = torch.randint(0, GLOBAL, (2, GLOBAL))

    local = table[part].clone().requires_grad_()
    gathered = collector.gather(local)
    assert torch.equal(gathered, table)
    (gathered * weights[part].sum(0)).sum().backward()
    assert torch.allclose(local.grad, weights.sum(0)[part])  # every rank's gradient, not only this one's

    rows, pairs = collector.exchange([table[part], ids[part]], list(wanted[:, part]))
    assert torch.equal(rows, table[wanted[0, part]]) and torch.equal(pairs, ids[wanted[1, part]])

    mean = collector.global_mean(table[part].sum(), torch.tensor(float(table[part].numel())))
    assert torch.allclose(collector.sum(mean) / collector.world_size, table.mean())

    whole = tiny_batch(GLOBAL)
    whole["image_id"][5] = whole["image_id"][
        2
    ]  # pairs of two ranks with one picture, and of two others with one caption
    for name in ("text_ids", "text_masks"):
        whole[name][6] = whole[name][1]
    batch = {k: v if v.dim() == 0 else v[part] for k, v in whole.items()}
    trim = int(batch["text_masks"].sum(1).max())  # ranks may trim their texts differently
    batch = {k: v[:, :trim] if k.startswith("text_") else v for k, v in batch.items()}
    result: dict = {"losses": {}, "grads": []}
    for name, settings in KINDS.items():
        model = tiny_model(**settings)
        out = model(batch)
        out.loss.backward()
        grads = torch.cat(
            [
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel(), dtype=p.dtype)
                for p in model.parameters()
            ]
        )
        found = {f"{name} {k}": float(collector.sum(v) / collector.world_size) for k, v in out.losses.items()}
        result["losses"] |= found
        result["grads"] += (collector.sum(grads) / collector.world_size).tolist()  # averaged, as DeepSpeed does
    if collector.rank == 0:
        with open(output, "w") as file:
            json.dump(result, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (1, 2, 4):
        run_ranks(["-c", f"from distributed.test_collector import worker; worker({str(folder / str(ranks))!r})"], ranks)
        found[ranks] = json.loads((folder / str(ranks)).read_text())
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_gradients_do_not_depend_on_ranks(results, ranks):
    assert len(set(results[1]["losses"].values())) >= 3 + 3 * 2
    for task, loss in results[1]["losses"].items():
        assert results[ranks]["losses"][task] == pytest.approx(loss, rel=1e-10)
    one, many = torch.tensor(results[1]["grads"]), torch.tensor(results[ranks]["grads"])
    assert (one - many).norm() / one.norm() < 1e-10


def features(rows, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_contrast_equals_the_plain_cross_entropies(chunk):
    image, text = features(7).requires_grad_(), features(7, seed=1).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64).requires_grad_()
    found = contrast(image, text, scale, Collector(), chunk=chunk)
    logits, label = scale * image @ text.t(), torch.arange(7)
    both = [torch.nn.functional.cross_entropy(of, label, reduction="sum") for of in (logits, logits.t())]
    expected = (both[0] + both[1]) / 2
    torch.testing.assert_close(found.loss, expected)
    assert int(found.i2t_right) == int((logits.argmax(1) == label).sum())
    assert int(found.t2i_right) == int((logits.argmax(0) == label).sum())
    assert found.image_B is None and found.text_B is None
    ours, theirs = (torch.autograd.grad(3 * loss, (image, text, scale)) for loss in (found.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


KEYS = torch.tensor(
    [[1, 5], [2, 6], [1, 7], [3, 6], [4, 8], [9, 9], [8, 4]]
)  # 0 and 2 have an image, 1 and 3 a caption in common


def alike(keys) -> torch.Tensor:
    return (keys[:, None] == keys[None]).any(-1)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_contrast_with_several_positives_equals_the_plain_mean_of_them(chunk):
    image, text = features(7).requires_grad_(), features(7, seed=1).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64).requires_grad_()
    found = contrast(image, text, scale, Collector(), key_BK=KEYS, chunk=chunk)
    logits, same = scale * image @ text.t(), alike(KEYS)
    assert same.sum() == 7 + 4
    target = same.double() / same.sum(1, keepdim=True)
    expected = -sum((of.log_softmax(1) * target).sum() for of in (logits, logits.t())) / 2
    torch.testing.assert_close(found.loss, expected)
    assert int(found.i2t_right) == int(same.gather(1, logits.argmax(1, keepdim=True)).sum())
    ours, theirs = (torch.autograd.grad(3 * loss, (image, text, scale)) for loss in (found.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keys", [None, KEYS])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_sigmoid_contrast_equals_the_plain_sum_over_all_pairs(chunk, keys):
    image, text = features(7).requires_grad_(), features(7, seed=1).requires_grad_()
    scale, bias = (torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (9.0, -4.0))
    found = sigmoid_contrast(image, text, scale, bias, Collector(), key_BK=keys, chunk=chunk)
    logits, same = scale * image @ text.t() + bias, torch.eye(7).bool() if keys is None else alike(keys)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, same.double(), reduction="sum")
    torch.testing.assert_close(found.loss, expected)
    assert int(found.i2t_right) == int(same.gather(1, logits.argmax(1, keepdim=True)).sum())
    ours, theirs = (torch.autograd.grad(3 * loss, (image, text, scale, bias)) for loss in (found.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_a_positive_is_no_negative():
    image, text, scale = features(7), features(7, seed=1), torch.tensor(5.0, dtype=torch.float64)
    ids, bias = torch.arange(7), torch.tensor(-3.0, dtype=torch.float64)
    drawn = set()
    for seed in range(40):
        draws = draws_of(ids, KEYS[:, 0], seed, Collector(), KEYS)
        plain = contrast(image, text, scale, Collector(), draws, key_BK=KEYS, chunk=4)
        found = sigmoid_contrast(image, text, scale, bias, Collector(), draws, KEYS, chunk=4)
        assert found.text_B.tolist() == plain.text_B.tolist() and found.image_B.tolist() == plain.image_B.tolist()
        drawn |= set(enumerate(found.text_B.tolist())) | set(enumerate(found.image_B.tolist()))
    assert len(drawn) > 15 and not any(alike(KEYS)[row, column] for row, column in drawn)


def test_captions_are_known_by_their_words_alone():
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 7, 8, 3, 9, 9], [2, 8, 7, 3, 0, 0], [2, 7, 8, 8, 3, 0]])
    masks = (torch.arange(6)[None] < torch.tensor([4, 4, 4, 5])[:, None]).long()
    words = keys_of(torch.arange(4), ids, masks)[:, 1]
    assert words[0] == words[1] and len(words.unique()) == 3
    assert torch.equal(keys_of(torch.arange(4), ids[:, :5], masks[:, :5])[:, 1], words)  # however long the padding


def test_negatives_of_the_contrast_are_those_of_a_pass_of_their_own():
    image, text, scale = features(9), features(9, seed=1), torch.tensor(5.0, dtype=torch.float64)
    ids, images = torch.arange(9), torch.arange(9) // 2
    draws = draws_of(ids, images, 3, Collector())
    found = contrast(image, text, scale, Collector(), draws, chunk=4)
    assert found.text_B.tolist() == sample_negatives(image, text, scale, draws[0]).tolist()
    assert found.image_B.tolist() == sample_negatives(text, image, scale, draws[1]).tolist()
    assert all(images[i] != images[j] for i, j in enumerate(found.text_B.tolist()))


def test_contrast_never_holds_the_whole_square():
    """Peak extra memory of forward and backward stays near the gradient of one modality's features."""
    from torch.profiler import ProfilerActivity, profile

    columns, width = 16384, 16
    image, text = features(64).float().requires_grad_(), features(64, seed=1).float().requires_grad_()
    others = torch.stack((features(columns, seed=2), features(columns, seed=3)), 1).float()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        contrast(image, text, torch.tensor(10.0), OneOfMany(others), chunk=256).loss.backward()
    largest = max((e.cpu_memory_usage for e in p.events() if e.cpu_memory_usage > 0), default=0)
    assert largest < 2.2 * columns * width * 4  # both modalities' features; the square has 64 columns * 4 bytes


def draw(q, k, scale, seed, image=None, chunk=4):
    ids, image_q = torch.arange(len(q)), torch.arange(len(q)) if image is None else image[: len(q)]
    candidates = torch.arange(len(k))
    of = Draw(seed, ids, candidates, image_q, candidates if image is None else image)
    return sample_negatives(q, k, torch.tensor(scale), of, chunk=chunk)


def test_negatives_follow_the_softmax():
    q, k, scale = features(1), features(6, seed=1), 3.0
    counts = torch.zeros(6)
    for seed in range(4000):
        counts[draw(q, k, scale, seed)] += 1
    logits = scale * (q @ k.t())[0]
    logits[0] = float("-inf")  # the query's own image
    expected = logits.softmax(0) * 4000
    assert counts[0] == 0
    chi_square = float(((counts[1:] - expected[1:]) ** 2 / expected[1:]).sum())
    assert chi_square < 20  # 4 degrees of freedom: 99.95% below


def test_no_caption_of_the_same_image_is_a_negative():
    image = torch.tensor([7, 7, 7, 8, 7, 7])
    q = features(6)
    for seed in range(50):
        drawn = draw(q, q, 100.0, seed, image)
        assert all(image[i] != image[j] for i, j in enumerate(drawn.tolist()))


def test_saturated_rows_still_have_a_draw():
    q = torch.eye(6, dtype=torch.float64)
    assert draw(q, q, 1e4, 0).tolist() != list(range(6))
    assert all(i != j for i, j in enumerate(draw(q, q, 1e4, 1).tolist()))


def test_chunks_and_neighbours_do_not_change_the_draw():
    q, k = features(6), features(9, seed=1)
    assert torch.equal(draw(q, k, 5.0, 3, chunk=2), draw(q, k, 5.0, 3, chunk=100))
    ids = torch.tensor([10**15, 5, 2**62])
    assert torch.equal(gumbel_noise(1, ids[1:], ids)[0], gumbel_noise(1, ids[1:2], ids)[0])
    assert not torch.equal(gumbel_noise(1, ids, ids), gumbel_noise(2, ids, ids))


def test_noise_is_gumbel():
    noise = gumbel_noise(0, torch.arange(300), torch.arange(300)).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.05)
    assert torch.isfinite(noise).all()


def test_a_batch_with_one_image_is_a_clear_error():
    with pytest.raises(ValueError, match="all 3 pairs of the ranks' micro-batches have image_id 4"):
        draw(features(3), features(3), 1.0, 0, torch.tensor([4, 4, 4]))


if __name__ == "__main__":
    worker(sys.argv[1])
