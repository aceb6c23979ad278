"""What weight decay is for: matrices and tables of words, and nothing else. By a family's own list, name by name."""

import itertools

import pytest
import torch

from vlmo_ds.families import FAMILIES
from vlmo_ds.families.interface import matches

LINEAR = ["attn.qkv.weight", "attn.proj.weight"]
EXPERTS = [f"mlp_{kind}.fc{number}.weight" for kind in ("text", "imag") for number in (1, 2)]
VL = [f"mlp_vl.fc{number}.weight" for number in (1, 2)]
TOP = {
    "text_embeddings.word_embeddings.weight",
    "transformer.patch_embed.proj.weight",
    "pooler.dense.weight",
    "mim_score.fc.weight",
    *(f"mim_score.{layer}.weight" for layer in ("query", "key_value", "proj", "mlp.fc1", "mlp.fc2")),
    "mlm_score.transform.dense.weight",
    "mlm_score.decoder.weight",
    "itm_score.fc.weight",
    *(f"itc_{twin}{kind}_proj.fc.weight" for twin in ("", "vl_") for kind in ("text", "image")),
    *(f"{task}_classifier.{layer}.weight" for task in ("vqa", "nlvr2") for layer in (0, 3)),
}
BLOCK = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
STACKS = [
    "visual.transformer.resblocks",
    "text.transformer.resblocks",
    "text_decoder.resblocks",
    "text_decoder.cross_attn",
]
POOLERS = {
    f"visual.attn_pool{name}.attn.{part}"
    for name in ("", "_contrastive")
    for part in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
}
COCA = {
    "visual.conv1.weight",
    "visual.proj",
    "visual.attn_pool_contrastive.attn.in_proj_weight",  # of the cascade, whose two poolers are of one width
    "text.token_embedding.weight",
    "text.text_projection",
    "text_decoder.text_projection",
}
ATTENTION = [f"self.{part}.weight" for part in ("query", "key", "value")] + ["output.dense.weight"]
BLIP = {
    "visual_encoder.patch_embed.proj.weight",
    "text_encoder.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.transform.dense.weight",
    "vision_proj.weight",
    "text_proj.weight",
    "itm_head.weight",
}
MULTIWAY = [f"self_attn.{part}_proj.{{}}.weight" for part in ("q", "k", "v", "out")] + [
    f"ffn.{{}}.fc{n}.weight" for n in (1, 2)
]
BEIT3 = {
    "beit3.text_embed.weight",
    "beit3.vision_embed.proj.weight",
    *(f"{head}.weight" for head in ("mlm_head", "mim_head", "language_head", "vision_head", "itm_score")),
    *(f"{pooler}.dense.weight" for pooler in ("pooler", "itm_pooler")),
    *(f"head{layer}.weight" for layer in ("", ".0", ".3", ".dense1", ".dense2")),
}
DECAYED = {
    "beit3": BEIT3
    | {f"beit3.encoder.layers.{i}.{name.format(expert)}" for i in (0, 1) for expert in "AB" for name in MULTIWAY},
    "blip": BLIP
    | {f"visual_encoder.blocks.{i}.{name}" for i in (0, 1) for name in [*LINEAR, "mlp.fc1.weight", "mlp.fc2.weight"]}
    | {"cls_head.0.weight", "cls_head.2.weight", "text_decoder.bert.embeddings.word_embeddings.weight"}
    | {
        f"text_{coder}.layer.{i}.{name}"
        for coder in ("encoder.encoder", "decoder.bert.encoder")
        for i in (0, 1)
        for name in (
            *(f"{kind}.{part}" for kind in ("attention", "crossattention") for part in ATTENTION),
            "intermediate.dense.weight",
            "output.dense.weight",
        )
    }
    | {
        f"text_encoder.encoder.layer.{i}.crossattention.{name}"
        for i in (0, 1)
        for name in (
            *(f"self{image}.{part}.weight" for image in (0, 1) for part in ("query", "key", "value")),
            *(f"output.dense{image}.weight" for image in (0, 1)),
        )
    }
    | {"text_encoder.encoder.layer.1.crossattention.output.merge_layer.weight"},
    "coca": COCA | POOLERS | {f"{stack}.{i}.{name}" for stack in STACKS for i in (0, 1) for name in BLOCK},
    "vqkd": {
        f"{stack}.{name}"
        for stack in ("encoder", "decoder")
        for name in (
            "patch_embed.proj.weight",
            *(f"blocks.{i}.{name}" for i in (0, 1) for name in [*LINEAR, "mlp.fc1.weight", "mlp.fc2.weight"]),
        )
    }
    | {f"{coder}code_task_layer.{i}.weight" for coder in ("en", "de") for i in (0, 2)},
    "vlmo": TOP
    | {f"mim_aggregation.blocks.{i}.{name}" for i in (0, 1) for name in [*LINEAR, "mlp.fc1.weight", "mlp.fc2.weight"]}
    | {f"transformer.blocks.{i}.{name}" for i in (0, 1) for name in LINEAR + EXPERTS}
    | {f"transformer.blocks.1.{name}" for name in VL},
}
SETTINGS = {
    "beit3": [
        {"embed_dim": 8, "depth": 2, "num_heads": 2, "vocab_size": 20, "vqav2_label_size": 3, "num_classes": 3},
        {"itc_kind": "sigmoid"},
    ],
    "blip": [
        {
            "embed_dim": 8,
            "image_size": 16,
            "patch_size": 8,
            "vision_width": 12,
            "vision_layers": 2,
            "text_width": 8,
            "text_layers": 2,
            "text_heads": 2,
            "text_hidden": 16,
            "vocab_size": 20,
        },
    ],
    "coca": [
        {
            "embed_dim": 8,
            "image_size": 16,
            "patch_size": 8,
            "vision_width": 12,
            "vision_layers": 2,
            "vision_head_width": 4,
            "pooler_heads": 2,
            "text_width": 8,
            "text_layers": 2,
            "text_heads": 2,
            "decoder_layers": 2,
            "decoder_heads": 2,
            "vocab_size": 20,
        },
        {"attentional_pool": "parallel", "itc_kind": "sigmoid"},
        {"attentional_pool": "cascade"},
    ],
    "vqkd": [{"embed_dim": 12, "depth": 2, "decoder_depth": 2, "num_codes": 5, "teacher_dim": 7}],
    "vlmo": [
        {
            "embed_dim": 8,
            "depth": 2,
            "num_heads": 2,
            "vlffn_start_layer_index": 1,
            "vocab_size": 20,
            "vqav2_label_size": 3,
        },
        {"mim_visible_only": True, "itc_kind": "sigmoid"},
        {"mim_target": "tokens", "num_visual_tokens": 5, "mim_early_layer": 1},
        {"use_abs_pos_emb": True, "need_relative_position_embed": False, "layer_scale_init_values": None},
    ],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decayed_tensors_are_the_intended_ones(name):
    family = FAMILIES[name]
    first, *others = SETTINGS[name]
    names = set()
    together = [name for name, task in family.tasks.items() if not task.alone]
    groups = (together, *([name] for name, task in family.tasks.items() if task.alone))
    for changes, tasks in itertools.product(({}, *others), groups):
        with torch.device("meta"):
            model = family.build(family.config(**first, **changes), dict.fromkeys(tasks, 1.0), None)
        names |= {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    assert {parameter for parameter in names if not matches(parameter, family.no_decay)} == DECAYED[name]
    unused = [pattern for pattern in family.no_decay if not any(matches(parameter, [pattern]) for parameter in names)]
    assert not unused
