"""BEiT-3: the backbone, its heads, and one training step as the engine runs it.

Everything goes through `BEiT3.forward`, because under ZeRO-3 the parameters that BEiT3 holds itself (the logit scale) are there only
inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.heads import TargetLinear
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import given, init_weights, normalize, unit, wide
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Contrasted, Draw
from vlmo_ds.families.beit3 import FAMILY
from vlmo_ds.families.beit3.backbone import Backbone, Encoded, Stream
from vlmo_ds.families.beit3.config import PIXELS, BEiT3Settings
from vlmo_ds.families.outside import TokensOfImages
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.objectives.captioning import hidden_words
from vlmo_ds.objectives.classification import classification_loss
from vlmo_ds.objectives.itc import keys_where, logit_parameters, loss_of
from vlmo_ds.objectives.itm import Negatives, draws_of, itm_loss
from vlmo_ds.objectives.mlm import IGNORE
from vlmo_ds.objectives.vqa import vqa_loss

LAST_QUERIES = ("self_attn.q_proj", "self_attn.out_proj", "self_attn.inner_attn_ln", "ffn", "final_layer_norm")
# Which experts have tokens in a task, and which of these are read behind the last block.
EXPERTS_OF = {"mim": "A", "classification": "A", "textmlm": "B"}  # of the others both
READ_OF = {**EXPERTS_OF, "itm": "A", "vqa": "A", "captioning": "B"}
HEAD_SCALE = 0.001  # of the first weights of the classes' head, as the reference has them


class Pooler(nn.Module):
    """Norm, linear layer and tanh on a class token."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.dense = nn.Linear(dim, dim)

    def forward(self, cls_BD: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(cls_BD)))


class PairClassifier(nn.Module):
    """Two linear layers, each behind a norm: [B, 4 D] of two pairs -> [B, 2] logits."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = LayerNorm(4 * dim)
        self.dense1 = nn.Linear(4 * dim, 2 * dim)
        self.norm2 = LayerNorm(2 * dim)
        self.dense2 = nn.Linear(2 * dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3(TokensOfImages):
    """BEiT-3 (arXiv:2208.10442) with the heads that its tasks need.

    tasks: task name -> loss weight. Names: mim, textmlm, mvlm (masked data modelling), itc, itm; irtr, vqa, nlvr2, captioning, classification go alone.
    Parameter names and shapes are those of the official checkpoints.
    """

    family = FAMILY
    config: BEiT3Settings

    def __init__(self, config: BEiT3Settings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        dim = config.embed_dim
        # classifiers have norms of their own
        self.beit3 = Backbone(config, self.recomputed, final_norm=not {"vqa", "classification"} & tasks.keys())
        if {"textmlm", "mvlm", "captioning"} & tasks.keys():
            self.mlm_head = TargetLinear(dim, config.vocab_size)
        if self.predicts_tokens:
            self.mim_head = TargetLinear(dim, config.num_visual_tokens)
        if {"itc", "irtr"} & tasks.keys():
            self.language_head, self.vision_head = (nn.Linear(dim, dim, bias=False) for _ in range(2))
            self.logit_scale, self.logit_bias = logit_parameters(config.itc_kind)
        if "itm" in tasks:
            self.itm_pooler, self.itm_score = Pooler(dim), nn.Linear(dim, 2)
        if "vqa" in tasks:
            self.pooler = Pooler(dim)
            self.head: nn.Module = nn.Sequential(
                nn.Linear(dim, 2 * dim),
                LayerNorm(2 * dim),
                nn.GELU(),
                nn.Linear(2 * dim, config.vqav2_label_size),
            )
        if "nlvr2" in tasks:
            self.head = PairClassifier(dim)
        if "classification" in tasks:
            self.fc_norm, self.head = LayerNorm(dim), nn.Linear(dim, config.num_classes)
        self.recomputed.tell(self)
        self.apply(partial(init_weights, std=config.init_std))
        if "classification" in tasks:
            with torch.no_grad():
                self.get_parameter("head.weight").mul_(HEAD_SCALE)
        self.beit3.reset_parameters(config.init_std)

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (all tasks, gives StepOutput); contrast_features and cached_step (of a gradient-cached step);
        encode_patches, encode_image, encode_text, match, answer, compare, caption_image, caption_step, classify (for evaluation and generation)."""
        return {
            "step": self.step,
            "contrast_features": self.contrast_features,
            "cached_step": lambda batch: (self.contrast_features(batch), StepOutput.empty()),
            "encode_patches": self.encode_patches,
            "encode_image": self.encode_image,
            "encode_text": self.encode_text,
            "match": self.match,
            "answer": self.answer,
            "compare": self.compare,
            "caption_image": self.caption_image,
            "caption_step": self.caption_step,
            "classify": self.classify,
        }[call](batch)

    # ---- one training step ----

    def step(self, batch: Batch) -> StepOutput:
        """The weighted losses of all tasks.

        batch, as far as the tasks need it; images [B, 3, S, S] uint8 (or float, already normalised), texts [B, L] int64:
        mim: images/image, images/image_mask [B, P] bool, images/visual_tokens [B, P] int64; textmlm: texts/text_ids_mlm,
        texts/text_labels_mlm (-100 where not masked), texts/text_masks; mvlm: image, image_mask, visual_tokens, text_ids, text_ids_mlm,
        text_labels_mlm, text_masks; itc, itm, irtr: image, text_ids, text_masks, image_id, sample_id [B] int64, and for itm
        negative_seed 0-d int64; vqa: as answer's, and vqa_targets [B, A] float; nlvr2: as compare's, and answers [B] int64;
        captioning: image, text_ids, text_masks, sample_id, step_seed 0-d int64; where captions begin with a prompt, prompt_words
        [B] int64: its words, the start included; classification: image, label [B] int64. Without visual_tokens the tokenizer makes them.
        """
        out = StepOutput.empty()
        if "irtr" in self.tasks:
            self.add_contrast(out, self.contrast_features(batch))
        elif "vqa" in self.tasks:
            self.record(out, "vqa", vqa_loss(self.answer(batch), batch["vqa_targets"], self.collector))
        elif "nlvr2" in self.tasks:
            self.record(out, "nlvr2", classification_loss(self.compare(batch), batch["answers"], self.collector))
        elif "classification" in self.tasks:
            found = classification_loss(
                self.classify(batch), batch["label"], self.collector, self.config.label_smoothing
            )
            self.record(out, "classification", found)
        elif "captioning" in self.tasks:
            self.record(out, "captioning", self.caption_loss(batch))
        else:
            self.pretraining_step(batch, out)
        return out._replace(loss=added(out.losses.values()))

    def pretraining_step(self, batch: Batch, out: StepOutput) -> None:
        """One walk of the stack for all that needs no mined negatives, and with itm one more for the mined pairs."""
        tasks, images = self.tasks, Images()
        streams: dict[str, Stream] = {}
        if "mim" in tasks:
            mask_BP = batch["images/image_mask"]
            streams["mim"] = Stream(
                images.add(self.pixels(batch["images/image"])), mask_BP, read_image=of_patches(mask_BP)
            )
        if "textmlm" in tasks:
            labels = batch["texts/text_labels_mlm"]
            streams["textmlm"] = Stream(
                ids_BL=batch["texts/text_ids_mlm"], text_mask_BL=batch["texts/text_masks"], read_text=labels != IGNORE
            )
        if {"mvlm", "itc", "itm"} & tasks.keys():
            rows = images.add(self.pixels(batch["image"]))
            pair = Stream(rows, None, batch["text_ids"], batch["text_masks"])
        if "mvlm" in tasks:
            streams |= self.masked_pairs(batch, pair)
        if "itc" in tasks:
            streams["image"] = Stream(rows, read_image="first")
            streams["text"] = pair._replace(image_rows_B=None, read_text="first")
        if "itm" in tasks:
            streams["itm"] = pair._replace(read_image="first", read_text="none")
        wave1 = self.encode(streams, images.all())

        if "mim" in tasks:
            tokens_BP = self.visual_tokens(batch, "images/")
            found = given(wave1["mim"].image, "image")
            self.record(out, "mim", self.masked_loss(self.mim_head, found, tokens_BP[batch["images/image_mask"]]))
        if "textmlm" in tasks:
            found = given(wave1["textmlm"].text, "text")
            self.record(out, "textmlm", self.masked_loss(self.mlm_head, found, labels[labels != IGNORE]))
        if "mvlm" in tasks:
            self.add_masked_pairs(out, batch, wave1)
        if "itc" in tasks:
            draws: tuple[Draw, Draw] | None = None
            terms = self.logit_terms() | keys_where(self.config.positives, batch)
            features = self.features(wave1["image"].image, wave1["text"].text) | terms
            if "itm" in tasks:
                ids, seed = (batch["sample_id"], batch["image_id"]), int(batch["negative_seed"])
                draws = draws_of(*ids, seed, self.collector, features.get("keys"))
            contrasted = self.add_contrast(out, features, draws)
        if "itm" in tasks:
            mined = self.mined_pairs(batch, contrasted)
            cls = torch.cat((given(wave1["itm"].image, "image"), mined))
            self.record(out, "itm", itm_loss(self.itm_score(self.itm_pooler(cls)), self.collector))

    # ---- masked data modelling ----

    def masked_pairs(self, batch: Batch, pair: Stream) -> dict[str, Stream]:
        """The views of pairs in which something is masked (the setting pair_views)."""
        mask_BP, labels = batch["image_mask"], batch["text_labels_mlm"]
        text = pair._replace(ids_BL=batch["text_ids_mlm"], read_image="none", read_text=labels != IGNORE)
        if self.config.pair_views == "one":
            return {"mvlm": text._replace(image_mask_BP=mask_BP, read_image=of_patches(mask_BP))}
        image = pair._replace(image_mask_BP=mask_BP, read_image=of_patches(mask_BP), read_text="none")
        return {"mvlm_text": text, "mvlm_image": image}

    def add_masked_pairs(self, out: StepOutput, batch: Batch, wave1: Mapping[str, Encoded]) -> None:
        """Records mvlm: the losses of masked words and of masked patches, added."""
        views = ("mvlm", "mvlm") if self.config.pair_views == "one" else ("mvlm_text", "mvlm_image")
        labels = batch["text_labels_mlm"]
        text, image = given(wave1[views[0]].text, "text"), given(wave1[views[1]].image, "image")
        of_text, right_text = self.masked_loss(self.mlm_head, text, labels[labels != IGNORE])
        tokens_M = self.visual_tokens(batch)[batch["image_mask"]]
        of_image, right_image = self.masked_loss(self.mim_head, image, tokens_M)
        out.values.update({"mvlm/text_loss": of_text.detach(), "mvlm/image_loss": of_image.detach()})
        ratios = {"text_accuracy": right_text["accuracy"], "image_accuracy": right_image["accuracy"]}
        self.record(out, "mvlm", (of_text + of_image, ratios))

    def masked_loss(
        self, head: TargetLinear, x_MD: Tensor, labels_M: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Cross-entropy averaged over the masked positions of the global batch, of which this rank has M; logits are there for some of them at
        a time."""
        total, right = head(x_MD, labels_M, smoothing)
        count = total.detach().new_tensor(len(labels_M))
        return self.collector.global_mean(total, count), {"accuracy": (right, count)}

    @property
    def predicts_tokens(self) -> bool:
        return bool({"mim", "mvlm"} & self.tasks.keys())

    # ---- image-text contrast and matching ----

    def features(self, image_BD: Tensor | None, text_BD: Tensor | None) -> dict[str, Tensor]:
        """Class tokens -> contrastive features of unit length, float32 at least."""
        found = {}
        if image_BD is not None:
            found["image"] = unit(self.vision_head(image_BD))
        if text_BD is not None:
            found["text"] = unit(self.language_head(text_BD))
        return found

    def logit_terms(self) -> dict[str, Tensor]:
        """The logarithm of what logits are multiplied with, and with the sigmoid loss what is added to them."""
        terms = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        return {name: term.clone() for name, term in terms.items() if term is not None}

    def contrast_features(self, batch: Batch) -> dict[str, Tensor]:
        """image, text_ids, text_masks -> what add_contrast needs, from one walk: features [B, D], logit scale."""
        images = self.pixels(batch["image"])
        streams = {"image": Stream(every(images), read_image="first"), "text": text_alone(batch)}
        encoded = self.encode(streams, images)
        terms = self.logit_terms() | keys_where(self.config.positives, batch)
        return self.features(encoded["image"].image, encoded["text"].text) | terms

    def add_contrast(
        self, out: StepOutput, found: Mapping[str, Tensor], draws: tuple[Draw, Draw] | None = None
    ) -> Contrasted:
        """Records the contrastive loss over the global batch, of what contrast_features gives; reads no parameter. draws: of hard
        negatives, which come with the result."""
        loss, ratios, contrasted, values = loss_of(found, self.collector, draws=draws)
        out.values.update(values)
        self.record(out, "irtr" if "irtr" in self.tasks else "itc", (loss, ratios))
        return contrasted

    def mined_pairs(self, batch: Batch, drawn: Contrasted) -> Tensor:
        """A walk of its own: image class tokens of (wrong image, text), then of (image, wrong text), [2B, D]."""
        negatives = Negatives(given(drawn.image_B, "image_B"), given(drawn.text_B, "text_B"))
        length = self.config.max_text_len  # ranks trim their texts differently; rows that travel have one shape
        ids, masks = (F.pad(batch[k], (0, length - batch[k].shape[1])) for k in ("text_ids", "text_masks"))
        wrong_image, wrong_ids, wrong_masks = self.collector.exchange(
            [batch["image"], ids, masks], [negatives.image_B, negatives.text_B, negatives.text_B]
        )
        images = self.pixels(torch.cat((wrong_image, batch["image"])))
        text, mask = torch.cat((ids, wrong_ids)), torch.cat((masks, wrong_masks))
        keep = int(mask.sum(1).max())
        pairs = Stream(every(images), None, text[:, :keep], mask[:, :keep], read_image="first", read_text="none")
        return given(self.encode({"pairs": pairs}, images)["pairs"].image, "image")

    # ---- captioning ----

    def caption_loss(self, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Hidden words of captions, each predicted from its image and the words before it: Kullback and Leibler's divergence from smoothed
        targets, as the reference (their cross-entropy less a constant). With text_ids_mlm in the batch those of text_labels_mlm
        are hidden, for parity checks."""
        if "text_ids_mlm" in batch:
            ids_BL, hidden_BL = batch["text_ids_mlm"], batch["text_labels_mlm"] != IGNORE
        else:
            lengths_B, seed = batch["text_masks"].sum(1), int(batch["step_seed"])
            hidden_BL = hidden_words(
                lengths_B,
                batch["text_ids"].shape[1],
                self.config.caption_mask,
                seed,
                batch["sample_id"],
                batch.get("prompt_words"),
            )
            ids_BL = batch["text_ids"].masked_fill(hidden_BL, self.mask_word)
        images = self.pixels(batch["image"])
        stream = Stream(every(images), None, ids_BL, batch["text_masks"], True, "none", hidden_BL)
        x_MD = given(self.encode({"captions": stream}, images)["captions"].text, "text")
        smoothing = self.config.label_smoothing
        loss, ratios = self.masked_loss(self.mlm_head, x_MD, batch["text_ids"][hidden_BL], smoothing)
        return loss - entropy(smoothing, self.config.vocab_size), ratios

    def caption_image(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """image [B, 3, S, S] -> what caption_step needs of it, computed once: keys and values [B, H, S, D/H] of every layer."""
        images, kept = self.pixels(batch["image"]), list[tuple[Tensor, Tensor]]()
        self.beit3([Stream(every(images), read_image="first")], images, kept)
        return kept

    def caption_step(self, batch: Mapping[str, Any]) -> Tensor:
        """text_ids [R, L] int64, the newest words of R = n * B texts, n for each of B images; first: words before them;
        memory: of caption_image; cache: Cache -> logits [R, V] of the word after the newest: those of a mask word there, which no later
        word sees."""
        ids_RL = F.pad(batch["text_ids"], (0, 1), value=self.mask_word)
        return wide(self.mlm_head(self.beit3.write(ids_RL, batch["first"], batch["memory"], batch["cache"])))

    @property
    def mask_word(self) -> int:
        return given(self.config.mask_word, "model.mask_word, the id of the tokenizer's mask word,")

    @property
    def unwritten(self) -> list[int]:
        return [self.mask_word]

    @property
    def cached_layers(self) -> int:
        """Layers that have a cache in caption_step."""
        return self.config.depth

    # ---- evaluation, and the steps of fine-tuning ----

    def encode(self, streams: Mapping[str, Stream], images: Tensor | None) -> dict[str, Encoded]:
        """Walks the stack once for all streams. images: normalised, what the streams' image_rows_B point to."""
        return dict(zip(streams, self.beit3(list(streams.values()), images), strict=True))

    def encode_patches(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> its patches' encodings [B, P, D], row by row."""
        images = self.pixels(batch["image"])
        return given(self.encode({"image": Stream(every(images))}, images)["image"].image, "image")[:, 1:]

    def encode_image(self, batch: Batch) -> dict[str, Tensor]:
        """image [B, 3, S, S] -> contrastive features image [B, D], of unit length."""
        images = self.pixels(batch["image"])
        encoded = self.encode({"image": Stream(every(images), read_image="first")}, images)
        return self.features(encoded["image"].image, None)

    def encode_text(self, batch: Batch) -> dict[str, Tensor]:
        """text_ids, text_masks [B, L] -> contrastive features text [B, D], of unit length."""
        return self.features(None, self.encode({"text": text_alone(batch)}, None)["text"].text)

    def match(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B pairs -> [B] log-odds that they match."""
        logits = wide(self.itm_score(self.itm_pooler(self.class_of_pairs(batch))))
        return logits[:, 1] - logits[:, 0]

    def answer(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B questions -> [B, vqav2_label_size] logits of the answers. With question_image [B] int64 in
        the batch, images are fewer, and each question is about that one."""
        return self.head(self.pooler(self.class_of_pairs(batch, batch.get("question_image"))))

    def class_of_pairs(self, batch: Batch, rows_B: Tensor | None = None) -> Tensor:
        """Class tokens of images seen with texts, [B, D]; rows_B: the image of each text, None: in order."""
        images = self.pixels(batch["image"])
        rows_B = every(images) if rows_B is None else rows_B
        pair = Stream(rows_B, None, batch["text_ids"], batch["text_masks"], read_image="first", read_text="none")
        return given(self.encode({"pair": pair}, images)["pair"].image, "image")

    def compare(self, batch: Batch) -> Tensor:
        """image_0, image_1, text_ids, text_masks of B sentences about two images -> [B, 2] logits, index 1 = true."""
        images = self.pixels(torch.cat((batch["image_0"], batch["image_1"])))
        ids, masks = (batch[k].repeat(2, 1) for k in ("text_ids", "text_masks"))
        pairs = Stream(every(images), None, ids, masks, read_image="first", read_text="first")
        image, text = self.encode({"pairs": pairs}, images)["pairs"]
        both = torch.cat((given(image, "image"), given(text, "text")), dim=1)
        return self.head(torch.cat(both.chunk(2), dim=1))

    def classify(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> [B, num_classes] logits, from the mean of the patches."""
        return self.head(self.fc_norm(self.encode_patches(batch).mean(1)))

    def contrast_scale(self) -> Tensor:
        return self.logit_scale.detach().float().exp()

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 image [B, 3, S, S] -> normalised, in the model's dtype."""
        return normalize(image, *PIXELS, self.beit3.vision_embed.cls_token.dtype)

    def idle(self) -> list[str]:
        """Patterns of what none of the tasks reaches: experts of a modality that none reads, and of the last block what is behind
        the attention of tokens that go no further."""
        experts = set().union(*(EXPERTS_OF.get(task, "AB") for task in self.tasks))
        read = set().union(*(READ_OF.get(task, "AB") for task in self.tasks))
        found = [] if {"mim", "mvlm"} & self.tasks.keys() else ["beit3.vision_embed.mask_token"]
        for expert, embedding in (("A", "beit3.vision_embed.*"), ("B", "beit3.text_embed.*")):
            if expert not in experts:
                found += [embedding, f"beit3.encoder.*.{expert}.*"]
            elif expert not in read:
                last = f"beit3.encoder.layers.{self.config.depth - 1}"
                found += [f"{last}.{part}.{expert}.*" for part in LAST_QUERIES]
                if self.beit3.encoder.layer_norm is not None:
                    found.append(f"beit3.encoder.layer_norm.{expert}.*")
        return found


class Images:
    """Images of one walk, one set behind the other."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, image: Tensor) -> Tensor:
        """Which of them these are, [B] int64."""
        self.parts.append(image)
        return every(image) + sum(len(part) for part in self.parts[:-1])

    def all(self) -> Tensor | None:
        return torch.cat(self.parts) if self.parts else None


def every(image: Tensor) -> Tensor:
    return torch.arange(len(image), device=image.device)


def of_patches(mask_BP: Tensor) -> Tensor:
    """A mask of patches as one of tokens, the class token's first."""
    return F.pad(mask_BP, (1, 0))


def text_alone(batch: Batch) -> Stream:
    return Stream(ids_BL=batch["text_ids"], text_mask_BL=batch["text_masks"], read_text="first")


def entropy(smoothing: float, words: int) -> float:
    """Of a target of which a share is spread over the other words."""
    shares = ((1 - smoothing, 1), (smoothing, words - 1))
    return -sum(share * math.log(share / among) for share, among in shares if share)
