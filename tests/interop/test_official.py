"""Files of other code bases, built here with their names: VLMo's, BEiT's, BERT's; nested, prefixed, in half precision."""

import argparse

import pytest
import torch
from conftest import call
from families.vlmo.tiny import JOINT, tiny_model
from safetensors.torch import save_file

from vlmo_ds.blocks.position import num_distances, num_image_distances, text_position_index
from vlmo_ds.config import RecipeError
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.vlmo.config import VLMoInit, VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.families.vlmo.weights import fit, window_of
from vlmo_ds.weights_file import read_weights


def small(**changes) -> VLMoSettings:
    return tiny_model(**changes).config


@pytest.mark.parametrize("nested", ["state_dict", "module", "model", None])
def test_official_files_are_read_wherever_their_weights_are(tmp_path, nested):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in tiny_model().state_dict().items()}
    weights["relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    weights["text_imag_relative_position_index"] = torch.zeros(41, 41, dtype=torch.long)
    named = {f"module.{k}": v for k, v in weights.items()} if nested == "module" else weights
    torch.save({nested: named, "epoch": 3} if nested else named, tmp_path / "official.pt")
    found = read_weights(tmp_path / "official.pt")
    assert found.keys() == weights.keys()
    model = VLMo(small(), JOINT)
    report = hand_over(model, found, VLMoInit(), "official.pt")
    assert report["converted"] == ["2 index buffers left out"] and not report["fresh"] and not report["dropped"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


@pytest.mark.parametrize("content", [{"weights": [1, 2]}, {"state_dict": {"a": "text"}}, [1], {}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "no.pt")
    with pytest.raises(RecipeError, match="no.pt holds no state dict"):
        read_weights(tmp_path / "no.pt")


def beit(config: VLMoSettings, window: int, shared: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    d, heads = config.embed_dim, config.num_heads

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    state = {"cls_token": draw(1, 1, d), "patch_embed.proj.weight": draw(d, 3, 8, 8), "patch_embed.proj.bias": draw(d)}
    if shared:
        state["rel_pos_bias.relative_position_bias_table"] = draw(num_image_distances(window), heads)
    for i in range(config.depth):
        block = f"blocks.{i}."
        shapes = {
            "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,), "gamma_1": (d,),
            "gamma_2": (d,), "attn.q_bias": (d,), "attn.v_bias": (d,), "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
            "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
        }  # fmt: skip
        state |= {block + name: draw(*shape) for name, shape in shapes.items()}
        if not shared:
            state[f"{block}attn.relative_position_bias_table"] = draw(num_image_distances(window), heads)
            state[f"{block}attn.relative_position_index"] = torch.zeros(5, 5, dtype=torch.long)
    return state | {"fc_norm.weight": draw(d), "fc_norm.bias": draw(d), "head.weight": draw(7, d), "head.bias": draw(7)}


FROM_BEIT = [
    "text_embeddings.*", "token_type_embeddings.*", "pooler.*", "transformer.norm.*", "transformer.blocks.*.*_text.*",
    "transformer.blocks.*.*_vl.*", "mlm_score.*",
]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [4, 3])
def test_beit_becomes_attention_and_vision_experts(shared, window):
    config = small()
    source = beit(config, window, shared)
    model = VLMo(config, {"textmlm": 1.0})
    report = hand_over(model, source, VLMoInit(fresh=FROM_BEIT), "beit.pth")
    state = model.state_dict()
    assert torch.equal(state["transformer.blocks.3.mlp_imag.fc1.weight"], source["blocks.3.mlp.fc1.weight"])
    assert torch.equal(state["transformer.blocks.1.norm2_imag.bias"], source["blocks.1.norm2.bias"])
    assert torch.equal(state["transformer.blocks.2.attn.qkv.weight"], source["blocks.2.attn.qkv.weight"])
    assert any("left out: fc_norm.weight" in change for change in report["converted"])
    table = state["relative_position_bias_table"]
    rows = num_image_distances(4)
    assert table[rows:].abs().max() == 0
    first = source[
        "rel_pos_bias.relative_position_bias_table" if shared else "blocks.0.attn.relative_position_bias_table"
    ]
    last = first if shared else source["blocks.3.attn.relative_position_bias_table"]
    assert torch.equal(table[rows - 3 : rows, :4], first[-3:])
    if window == 4:
        assert torch.equal(table[:rows, :4], first) and torch.equal(table[:rows, 12:], last)
    else:  # resampled: the distance zero is known
        assert torch.allclose(table[24, :4], first[12], atol=1e-5)


def test_berts_embeddings_in_their_old_and_new_names(tmp_path):
    g = torch.Generator().manual_seed(0)
    names = {
        "word_embeddings.weight": (50, 32), "position_embeddings.weight": (512, 32), "token_type_embeddings.weight": (2, 32),
        "LayerNorm.gamma": (32,), "LayerNorm.beta": (32,),
    }  # fmt: skip
    state = {f"bert.embeddings.{name}": torch.randn(*shape, generator=g) for name, shape in names.items()}
    state |= {
        "bert.encoder.layer.0.attention.self.query.weight": torch.zeros(3, 3),
        "cls.predictions.bias": torch.zeros(3),
    }
    save_file(state, tmp_path / "bert.safetensors")
    model = VLMo(small(), JOINT)
    others = [f"{name}.*" for name in ("transformer", "pooler", "token_type_embeddings", "mlm_score", "itm_score")]
    fresh = [*others, "itc_*", "logit_*scale", "relative_position_bias_table"]
    report = hand_over(model, read_weights(tmp_path / "bert.safetensors"), VLMoInit(fresh=fresh), "bert")
    assert "BERT: 5 tensors of its embeddings, 2 left out" in report["converted"]
    embeddings = model.text_embeddings.state_dict()
    assert torch.equal(embeddings["word_embeddings.weight"], state["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(
        embeddings["position_embeddings.weight"], state["bert.embeddings.position_embeddings.weight"][:24]
    )
    assert torch.equal(embeddings["LayerNorm.bias"], state["bert.embeddings.LayerNorm.beta"])


def test_a_vocabulary_that_does_not_fit_is_refused():
    source = dict(tiny_model().state_dict())
    source["text_embeddings.word_embeddings.weight"] = torch.zeros(60, 32)
    with pytest.raises(RecipeError, match=r"word_embeddings.weight is \[60, 32\] there and \[50, 32\] in this model"):
        hand_over(VLMo(small(), JOINT), source, VLMoInit(), "x.pt")


def test_image_size_and_text_lengths_change_at_once():
    """Also the text length that the relative table has rows for; every pair of words keeps its bias."""
    source = tiny_model().state_dict()
    config = small(image_size=48, max_text_len=30, max_text_len_of_initckpt=40)
    model = VLMo(config, JOINT).double()
    report = hand_over(model, source, VLMoInit(max_text_len_of_initckpt=24), "source")
    assert any("4 x 4 to 6 x 6 patches" in change for change in report["converted"])
    table, before = model.relative_position_bias_table.detach(), source["relative_position_bias_table"]
    ours = table[text_position_index(6, 24, 40)]
    assert torch.equal(ours, before[text_position_index(4, 24, 24)])
    assert torch.equal(table[num_image_distances(6) : num_image_distances(6) + 2], before[52:54])
    with pytest.raises(RecipeError, match="fits no image size with texts of max_text_len_of_initckpt 40: set init"):
        hand_over(VLMo(config, JOINT), source, VLMoInit(), "source")


def test_the_same_sizes_change_nothing():
    state = tiny_model().state_dict()
    fitted, changed = fit(state, VLMo(small(), JOINT).state_dict(), small())
    assert changed == [] and all(torch.equal(fitted[k], state[k]) for k in state)


@pytest.mark.parametrize("window, text_len", [(14, 196), (24, 196), (4, 24)])
def test_the_window_is_known_from_the_rows(window, text_len):
    assert window_of(torch.zeros(num_distances(window, text_len), 1), text_len) == window


def test_a_third_token_type_begins_as_the_second():
    source = tiny_model().state_dict()
    model = VLMo(small(), {"nlvr2": 1.0}).double()
    init = VLMoInit(fresh=["nlvr2_classifier.*"], drop=["itc_*", "logit_*scale", "itm_score.*", "mlm_score.*"])
    report = hand_over(model, source, init, "source")
    assert torch.equal(model.token_type_embeddings.weight, source["token_type_embeddings.weight"][[0, 1, 1]])
    assert any("a second image begins as the first" in change for change in report["converted"])


class Settings:
    """An object that a file of weights may carry along."""


def test_pickled_objects_are_named_with_what_to_do(tmp_path):
    file = tmp_path / "with_objects.pt"
    torch.save({"model": {"w": torch.zeros(2)}, "args": Settings()}, file)
    with pytest.raises(
        RecipeError, match=r"it holds a pickled \S+\.Settings, and pickles can run code: .* save the weights alone"
    ):
        read_weights(file)


def test_pickled_arguments_are_no_obstacle(tmp_path):
    file = tmp_path / "with_arguments.pt"
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1e-3, name="x", sizes=[1, 2])}, file)
    assert read_weights(file)["w"].tolist() == [1, 1]


def test_checkpoints_of_deepspeed_are_known(tmp_path):
    stub = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {f"w{i}": torch.zeros(0) for i in range(3)}, "ds_config": {"a": 1}}, stub)
    with pytest.raises(
        RecipeError,
        match=r"3 empty tensors \(w0, ...\): it is one rank's file of a ZeRO-3 checkpoint .* zero_to_fp32.py",
    ):
        read_weights(stub)
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(RecipeError, match="is a checkpoint of DeepSpeed, for one number of ranks and one ZeRO stage"):
        read_weights(tmp_path)
    within = tmp_path / "step-00000005"
    within.mkdir()
    (within / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="is a checkpoint within a stage: .*checkpoint consolidate"):
        read_weights(within)


def test_a_device_that_is_not_there_is_told_of():
    done = call("vlmo_ds.interop.parity", "file.pt", "--device", "abacus", code=2)
    assert "error: --device abacus: Expected one of" in done.stderr
