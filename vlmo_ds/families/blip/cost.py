"""What BLIP's step costs: operations, memory, bytes on the wire. For `plan`; texts count as long as they may be."""

from __future__ import annotations

from vlmo_ds.config import StageConfig
from vlmo_ds.families.blip.base import BLIPModel
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.families.interface import Load, matches
from vlmo_ds.objectives.captioning import CHUNK


def sequences(stage: StageConfig) -> tuple[int, int]:
    """Texts of a sample in a step: (read alone, with an image or, as an answer, with the states of a question)."""
    looking = {"itm": 3, "lm": 1, "vqa": 2 * stage.data.questions_per_image, "nlvr2": 1}
    return int("itc" in stage.tasks), sum(looking.get(task, 0) for task in stage.tasks)


def images(stage: StageConfig) -> int:
    """Of a sample."""
    return 2 if "nlvr2" in stage.tasks else 1


def tower_flops(config: BLIPSettings) -> float:
    """Of one image."""
    tokens, d = config.patches + 1, config.vision_width
    blocks = config.vision_layers * (tokens * 24 * d**2 + 4 * tokens**2 * d)
    return blocks + 2 * config.patches * 3 * config.patch_size**2 * d


def text_flops(config: BLIPSettings) -> tuple[float, float, float]:
    """Of one text: (read alone, what an image adds to it), and (of an image's keys and values)."""
    length, tokens, d = config.max_text_len, config.patches + 1, config.text_width
    alone = length * (8 * d**2 + 4 * d * config.text_hidden) + 4 * length**2 * d
    looking = length * 4 * d**2 + 4 * length * tokens * d
    memory = 4 * tokens * config.vision_width * d
    return config.text_layers * alone, config.text_layers * looking, config.text_layers * memory


def forward_flops(config: BLIPSettings, stage: StageConfig, samples: float = 1.0) -> float:
    """Multiply-adds times two of the forward pass. What has no backward pass counts as a third of its own: the teacher's, and that of the
    texts which wrong pairs are drawn by."""
    read, looking = sequences(stage)
    of_text, of_look, of_memory = text_flops(config)
    d = config.text_width
    pictures = images(stage)
    total = pictures * (tower_flops(config) + bool(looking) * of_memory)
    total += (read + looking) * of_text + pictures * looking * of_look
    if read:
        heads = 2 * config.embed_dim * (config.vision_width + d)
        total += heads + (tower_flops(config) + (1 + ("itm" in stage.tasks)) * of_text + heads) / 3
        total += 4 * config.embed_dim * (config.queue_size + stage.global_batch_size)
    if {"lm", "vqa"} & stage.tasks.keys():
        words = stage.data.questions_per_image * (config.max_text_len - 1)
        total += words * (2 * d**2 + 2 * d * config.vocab_size)
    return samples * total


def activations(config: BLIPSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Estimates of what the forward pass leaves for the backward pass (8 tensors of a block's width and 1 of its hidden width a
    token, 5 more where it looks at an image), of logits, and of the queue with the teacher's float32 weights."""
    b, every = load.bytes, config.recompute_every
    read, looking = sequences(stage)

    def stack(layers: int, tokens: float, kept: float, row: float) -> float:
        share = 1 - (-(-layers // every) / layers if every else 0)  # of blocks that keep everything
        return layers * tokens * (share * kept + (1 - share) * (0 if load.offloaded else row)) * b

    vision, text = config.vision_width, config.text_width
    alone, length = 8 * text + config.text_hidden, config.max_text_len
    per_sample = images(stage) * stack(config.vision_layers, config.patches + 1, 12 * vision, vision)
    per_sample += stack(config.text_layers, read * length, alone, text)
    per_sample += stack(config.text_layers, looking * length, alone + 5 * images(stage) * text, text)
    logits = features = 0.0
    if {"lm", "vqa"} & stage.tasks.keys():
        words = load.micro * stage.data.questions_per_image * (length - 1)
        logits = 3 * min(CHUNK, words) * config.vocab_size * 4
    if read:
        columns = config.queue_size + load.micro * load.ranks * load.accumulation
        logits += 6 * load.micro * columns * 4
        features = 4 * columns * config.embed_dim * 4
        if load.bytes < 4:
            features += 4 * teacher_numbers(config)
    return {"activations": load.micro * per_sample, "logits": logits, "features": features, "collector": 0.0}


def teacher_numbers(config: BLIPSettings) -> int:
    """The teacher's parameters."""
    d, v, t = config.text_width, config.vision_width, config.text_layers
    vision = config.vision_layers * 12 * v**2 + (config.patches + 1 + 3 * config.patch_size**2) * v
    text = t * (6 * d**2 + 2 * v * d + 2 * d * config.text_hidden) + (config.vocab_size + config.positions) * d
    return vision + text + config.embed_dim * (v + d)


def collectives(config: BLIPSettings, stage: StageConfig, load: Load) -> dict[str, float]:
    """Bytes that a rank receives in an optimiser step for the teacher's keys and for wrong pairs: encoded images and their
    gradients, texts."""
    if "itc" not in stage.tasks:
        return {}
    away = (load.ranks - 1) / load.ranks
    rows = load.micro * load.ranks * load.accumulation
    wire = {"all-gather": away * rows * (2 * 4 * config.embed_dim + 16), "all-to-all": 0.0}
    if "itm" in stage.tasks:
        wire["all-gather"] += away * rows * 3 * 8
        image = 2 * (config.patches + 1) * config.vision_width * load.bytes
        others = (load.micro * load.ranks - load.micro) / max(load.micro * load.ranks - 1, 1)
        wire["all-to-all"] = others * load.micro * load.accumulation * (image + 8 * (config.max_text_len + 1))
    return wire


def walks(model: BLIPModel, stage: StageConfig) -> dict[str, int]:
    """How often a forward pass enters the module that holds a parameter; the teacher's, which have no backward pass, count whole."""
    idle = model.idle()
    if {"vqa", "nlvr2"} & stage.tasks.keys():
        twice = "text_decoder.bert.embeddings.word_embeddings.weight"  # looked up, and multiplied with
        return {name: 2 if name == twice else 1 for name, _ in model.named_parameters()}
    read, looking = sequences(stage)
    drawn = int("itm" in stage.tasks)  # a walk before, of texts alone
    found = {}
    for name, _ in model.named_parameters():
        count = 1
        if name.startswith("text_encoder."):
            if "crossattention" in name:
                count = int(looking > 0)
            elif ".attention." in name:
                count = int(read > 0) + drawn
            else:
                count = 1 + drawn + ("word_embeddings" in name and "lm" in stage.tasks)
        elif name.startswith(("vision_proj.", "text_proj.")):
            count = 1 + drawn
        elif name.startswith("text_encoder_m.") and "crossattention" in name:
            count = 0
        found[name] = 0 if matches(name, idle) else count
    return found
