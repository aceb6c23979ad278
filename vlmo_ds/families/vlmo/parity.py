"""VLMo's recorded numbers: features, logits, losses and gradients (vlmo-golden-1), and weights for another image size and
text length (vlmo-golden-resize-1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ds.blocks.layers import given
from vlmo_ds.families.comparing import BARS, relative_difference
from vlmo_ds.families.handing_over import hand_over
from vlmo_ds.families.interface import Check
from vlmo_ds.families.step import added
from vlmo_ds.families.vlmo.block import by_run
from vlmo_ds.families.vlmo.config import TASKS as KNOWN
from vlmo_ds.families.vlmo.config import VLMoInit, VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo
from vlmo_ds.families.vlmo.multiway import Stream, folds_of, upper_order
from vlmo_ds.families.vlmo.weights import TABLE, TEXT_POSITION_IDS, to_vlmo, vlmo_name
from vlmo_ds.objectives.itc import scale_of

JOINT = {"mlm": 0.25, "itc": 1.0, "itm": 1.0}
TASKS = {"mlm": JOINT, "itc": JOINT, "itm": JOINT} | {task: {task: 1.0} for task in ("textmlm", "irtr", "vqa", "nlvr2")}
LOGITS = {"itm": "itm_score", "vqa": "vqa_classifier", "nlvr2": "nlvr2_classifier"}  # the module that gives them


def build(golden: dict, tasks: dict[str, float], dtype: torch.dtype) -> VLMo:
    """The model of the file's config with the file's weights; every parameter must be in the file."""
    settings = {k: v for k, v in golden["config"].items() if k in VLMoSettings.model_fields}
    model = VLMo(VLMoSettings(**settings), tasks).to(dtype).eval()
    state = golden["nlvr2_state_dict" if "nlvr2" in tasks else "state_dict"]
    wanted = model.state_dict()
    missing = wanted.keys() - state.keys()
    if missing:
        raise SystemExit(f"the file has no weights for {sorted(missing)}")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(state[name])
    return model


def features(model: VLMo, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every recorded encoding, from one walk of the stack."""
    text = model.embed_texts({"clean": batch["text_ids"], "masked": batch["text_ids_mlm"]}, model.token_types())
    mask, length = batch["text_masks"], batch["text_ids"].shape[1]
    rows = torch.arange(len(batch["image"]))
    streams = {
        "infer": Stream(text["clean"], mask, rows),
        "infer_mlm": Stream(text["masked"], mask, rows),
        "infer_text": Stream(text["clean"], mask, vl_twin=True),
        "infer_image": Stream(image_rows_B=rows, vl_twin=True),
        "infer_text_mlm": Stream(text["masked"], mask),
    }
    before_norm: list[Tensor] = []
    hook = model.transformer.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    encoded = model.encode(streams, batch["image"], model.token_types()[1])
    hook.remove()
    raw = {}  # the reference records one-modality class tokens before the final norm
    of = list(streams.values())
    pieces = model.transformer.place(of, folds_of(of), upper_order(of))
    packed = by_run([run for _, run in pieces], before_norm[0])
    for kind, run in pieces:
        if not kind.twin:
            raw[list(streams)[kind.owner]] = run.sequences(packed[run.start])[:, 0]
    out = {}
    for name, stream in encoded.items():
        tokens = stream.tokens_BLD
        out[f"{name}.raw_cls_feats"] = tokens[:, 0] if streams[name].joint else raw[name]
        if name != "infer_image":
            out[f"{name}.text_feats"] = tokens[:, :length]
        if name in ("infer", "infer_mlm"):
            out[f"{name}.image_feats"] = tokens[:, length:]
            out[f"{name}.cls_feats"] = model.pooler(tokens[:, 0])
    out["infer_image.image_feats"] = encoded["infer_image"].tokens_BLD
    contrast = model.itc_features(encoded["infer_image"], encoded["infer_text"])
    out["infer_image.cls_feats"], out["infer_image.cls_vlffn_feats"] = contrast["image"], contrast["vl_image"]
    out["infer_text.cls_feats"], out["infer_text.cls_vlffn_feats"] = contrast["text"], contrast["vl_text"]
    scale = scale_of(model.logit_scale, contrast["image"])
    out["itc.itc_i2t_logits"] = scale * contrast["image"] @ contrast["text"].t()
    out["itc.itc_logit_scale"] = scale
    out["itc.itc_logit_vl_scale"] = model.logit_vl_scale.exp()
    return out


def step_inputs(golden: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = {k: v for k, v in golden["batch"].items() if isinstance(v, Tensor)}
    batch |= {k: batch[k].to(dtype) for k in ("image", "image_0", "image_1")}
    ids = torch.arange(len(batch["image"]))
    targets = torch.zeros(len(ids), golden["config"]["vqav2_label_size"], dtype=torch.float64)
    for row, labels, scores in zip(targets, golden["batch"]["vqa_labels"], golden["batch"]["vqa_scores"], strict=True):
        row[labels] = row.new_tensor(scores)
    recorded = golden["outputs"]["itm"]
    return batch | {
        "sample_id": ids,
        "image_id": ids,
        "vqa_targets": targets,
        "negative_seed": torch.tensor(0),
        "negative_image_index": recorded["negative_image_index"],
        "negative_text_index": recorded["negative_text_index"],
    }


def compare(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative difference, bar)."""
    bar, _ = BARS[dtype]
    batch = step_inputs(golden, dtype)
    valid = batch["text_masks"].bool()
    with torch.no_grad():
        ours = features(build(golden, JOINT, dtype), batch)
    for group in ("infer", "infer_mlm", "infer_text", "infer_image", "infer_text_mlm", "itc"):
        for name, recorded in golden["outputs"][group].items():
            value = ours[f"{group}.{name}"]
            if name == "text_feats":  # features at padded positions are meaningless
                value, recorded = value[valid], recorded[valid]
            yield f"{group}.{name}", relative_difference(value, recorded), bar
    for task, tasks in TASKS.items():
        yield from compare_task(golden, build(golden, tasks, dtype), batch, task, dtype)


def compare_task(
    golden: dict, model: VLMo, batch: dict[str, Tensor], task: str, dtype: torch.dtype
) -> Iterator[tuple[str, float, float]]:
    """A task's loss, logits and gradients."""
    bar, gradient_bar = BARS[dtype]
    logits: list[Tensor] = []
    if task in LOGITS:
        getattr(model, LOGITS[task]).register_forward_hook(lambda *args: logits.append(args[2]))
    loss = model(batch).losses[task]
    name = f"losses.{task} (weight {KNOWN[task].weight:g})"
    yield name, relative_difference(loss, golden["losses"][task]), bar
    if logits:
        yield f"{task}.logits", relative_difference(logits[0], golden["outputs"][task]["logits"]), bar
    loss.backward()
    recorded = golden["grads"][task]
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name in recorded:
            difference = float("inf") if grad is None else relative_difference(grad, recorded[name])
            yield f"grads.{task}.{name}", difference, gradient_bar
        elif grad is not None and bool(grad.ne(0).any()):
            yield f"grads.{task}.{name} (recorded: none)", float("inf"), gradient_bar
    for name in recorded.keys() - dict(model.named_parameters()).keys():
        yield f"grads.{task}.{name} (the model has no such parameter)", float("inf"), gradient_bar


def compare_resized(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Weights handed over to a model of another image size and text length; every other weight has to stay."""
    settings = {k: v for k, v in golden["config"].items() if k in VLMoSettings.model_fields}
    config = VLMoSettings(
        **settings, image_size=golden["target_image_size"], max_text_len=golden["target_max_text_len"]
    )
    model = VLMo(config, JOINT).to(dtype)
    source = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden["state_dict"].items()}
    hand_over(model, source, VLMoInit(), "the file")
    for name, value in model.state_dict().items():
        expected = golden["resized"].get(name, golden["state_dict"][name])
        if name != TEXT_POSITION_IDS:
            yield name, relative_difference(value, expected), BARS[torch.float32][0]  # recorded in float32


def compare_tokens(golden: dict, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """BEiT v2's masked image modelling: its weights as those of an image stage on visual tokens with patch aggregation."""
    bar, gradient_bar = BARS[dtype]
    recorded, of_file = golden["config"], golden["state_dict"]
    sizes = {name: recorded[name] for name in ("embed_dim", "depth", "num_heads", "image_size", "patch_size")}
    config = VLMoSettings(
        **sizes,
        vlffn_start_layer_index=recorded["depth"],
        vocab_size=2,
        mim_target="tokens",
        num_visual_tokens=recorded["num_codes"],
        mim_early_layer=recorded["early_layers"],
        mim_head_layers=recorded["head_layers"],
    )
    model = VLMo(config, {"mim": 1.0}).to(dtype)
    moved = [("lm_head.", "mim_score.fc."), ("cls_pt_layers.", "mim_aggregation.blocks.")]

    def here(name: str) -> str:
        for before, after in moved:
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name

    others = {name: value for name, value in of_file.items() if here(name) != name}
    weights, _ = to_vlmo({name: value for name, value in of_file.items() if name not in others}, config)
    weights |= {here(name): value for name, value in others.items()}
    weights["token_type_embeddings.weight"] = torch.zeros(2, config.embed_dim)  # which the reference has none of
    missing, unexpected = model.load_state_dict(
        {name: value.to(dtype) for name, value in weights.items()}, strict=False
    )
    text = ("text_embeddings.", "pooler.", "transformer.blocks.")
    if unexpected or any(not name.startswith(text) for name in missing):
        raise SystemExit(f"the file's weights do not fit: missing {missing}, unexpected {unexpected}")
    image, mask_BP, code_BP = (golden["batch"][name] for name in ("image", "image_mask", "codes"))
    hidden: list[Tensor] = []
    hook = model.mim_score.fc.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    loss = model({"image": image.to(dtype), "image_mask": mask_BP, "visual_tokens": code_BP}).losses["mim"]
    hook.remove()
    for name, of_patches in zip(("patch", "cls"), hidden, strict=True):
        logits = model.mim_score.fc(of_patches)
        yield f"{name}_logits", relative_difference(logits, golden["outputs"][f"{name}_logits"]), bar
        own = F.cross_entropy(logits, code_BP[mask_BP])
        yield f"losses.{name}", relative_difference(own, golden["losses"][name]), bar
    yield "losses", relative_difference(loss, added(golden["losses"].values())), bar
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    table = given(gradients.pop(TABLE), TABLE)
    rows = len(of_file[f"rel_pos_bias.{TABLE}"])
    shared = table[:rows].unflatten(1, (config.depth, -1)).sum(1)  # one table for all layers there
    yield f"grads.{TABLE}", relative_difference(shared, golden["grads"][f"rel_pos_bias.{TABLE}"]), gradient_bar
    for name, value in golden["grads"].items():
        ours = gradients.get(here(name) if name in others else vlmo_name(name))
        if name != f"rel_pos_bias.{TABLE}":
            yield f"grads.{name}", float("inf") if ours is None else relative_difference(ours, value), gradient_bar


FORMATS: Mapping[str, Check] = {
    "vlmo-golden-1": compare,
    "vlmo-golden-resize-1": compare_resized,
    "beit2-mim-golden-1": compare_tokens,
}
