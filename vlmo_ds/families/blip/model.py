"""BLIP (arXiv:2201.12086): contrast with a teacher and a queue, matching with hard negatives, captioning, on one text stack.

Parameter names and shapes are those of the reference; what its text decoder shares with its text encoder is there once, under
the encoder's name. The teacher's names end in _m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.layers import unit, wide
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Draw, sample_negatives
from vlmo_ds.families.blip.base import BLIPModel, begun_with
from vlmo_ds.families.blip.config import AVERAGED, HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, BLIPSettings
from vlmo_ds.families.blip.text import Look, Memory, TextDecoder, TextEncoder
from vlmo_ds.families.blip.vision import VisionTransformer
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.objectives.captioning import before_last, chosen, learned_words
from vlmo_ds.objectives.itm import Negatives, itm_loss
from vlmo_ds.objectives.momentum import Keys, momentum_contrast

EMPTY = -(2**63)  # image id of a place in the queue where nothing stands
RANDOM = EMPTY + 1  # and above: of the random features that a queue may begin with
FLOOR = 1e-4  # of a wrong pair's share, so that none is impossible (the reference)


class BLIP(BLIPModel):
    """BLIP as it is pretrained, with what its tasks need. tasks: task name -> loss weight, of itc, itm and lm."""

    heads = ("itm_head", "vision_proj")
    image_queue: Tensor  # [E, K] float32
    text_queue: Tensor
    idx_queue: Tensor  # [1, K] int64, image ids
    queue_ptr: Tensor  # [1] int64, the place that is filled next

    def __init__(self, config: BLIPSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        if "lm" in tasks:
            self.text_decoder = TextDecoder(config)
        if "itm" in tasks:
            self.itm_head = nn.Linear(config.text_width, 2)
        if "itc" in tasks:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            self.temp = nn.Parameter(torch.tensor(0.07))
        self.reset_parameters()
        if "itc" in tasks:
            self.add_teacher()

    def add_teacher(self) -> None:
        """The teacher begins as the student; the queue empty, or with random features."""
        config = self.config
        never = Recomputed()  # it has no backward pass
        self.visual_encoder_m = VisionTransformer(config, never)
        self.text_encoder_m = TextEncoder(config, never)
        self.vision_proj_m = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj_m = nn.Linear(config.text_width, config.embed_dim)
        with torch.no_grad():
            for teacher, student in self.followed().items():
                self.get_parameter(teacher).requires_grad_(False).copy_(self.get_parameter(student))
        size, width = config.queue_size, config.embed_dim
        features = [torch.zeros(width, size) for _ in range(2)]
        ids = torch.full((1, size), EMPTY)
        if config.queue_init == "random":
            features = [F.normalize(torch.randn(width, size), dim=0) for _ in range(2)]
            ids = RANDOM + torch.arange(size)[None]
        self.register_buffer("image_queue", features[0])
        self.register_buffer("text_queue", features[1])
        self.register_buffer("idx_queue", ids)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.train(self.training)

    def followed(self) -> dict[str, str]:
        """Teacher's parameter -> the student's that it follows."""
        found = {name: student_of(name) for name, _ in self.named_parameters()}
        return {name: student for name, student in found.items() if student}

    @property
    def momentum(self) -> float:
        return self.config.momentum

    def train(self, mode: bool = True) -> BLIP:
        """The teacher has no dropout: it stays in evaluation mode."""
        super().train(mode)
        for name in AVERAGED:
            if hasattr(self, name.removesuffix(".")):
                getattr(self, name.removesuffix(".")).eval()
        return self

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (all tasks, gives StepOutput); keys (of the teacher, before a step); encode_patches, encode_image, encode_text, match,
        caption_image, caption_step (for evaluation and generation)."""
        return {
            "step": self.step,
            "keys": self.keys,
            "encode_patches": self.encode_patches,
            "encode_image": self.encode_image,
            "encode_text": self.encode_text,
            "match": self.match,
            "caption_image": self.caption_image,
            "caption_step": self.caption_step,
        }[call](batch)

    # ---- one training step ----

    def step(self, batch: Batch) -> StepOutput:
        """The weighted losses of all tasks.

        batch: image [B, 3, S, S] uint8 (or float, normalised), text_ids, text_masks [B, L], image_id, sample_id [B] int64,
        negative_seed 0-d int64 (itm); with itc what keys_of_step gives, and `part`, the number of this micro-batch among those of
        the optimiser's step, and `step`, how many steps there were before, both 0-d int64: all of them may be left out, for a
        batch that is a step of its own. Where captions begin with a prompt, prompt_words [B] int64: its words, the start included.
        """
        out = StepOutput.empty()
        if "itc" in self.tasks and "keys_image" not in batch:
            batch = {**batch, **self.keys_of_step([self.keys(batch)])}
        image_BSD = self.visual_encoder(self.pixels(batch["image"]))
        self.add_texts(out, batch, image_BSD, self.negatives(batch, image_BSD) if "itm" in self.tasks else None)
        return out._replace(loss=added(out.losses.values()))

    def add_contrast_with_keys(self, out: StepOutput, batch: Batch, image: Tensor, text: Tensor) -> None:
        """Records itc of features [B, E] of this rank."""
        keys, temperature, alpha = self.all_keys(batch), self.temperature(), self.alpha(batch)
        ids = batch["image_id"]
        rows = slice(self.collector.first_row(len(ids)), self.collector.first_row(len(ids)) + len(ids))
        part = int(batch.get("part", 0))
        teacher_image, teacher_text = batch["keys_image"][part][rows], batch["keys_text"][part][rows]
        contrast = partial(momentum_contrast, keys=keys, image_id_B=ids, temperature=temperature, alpha=alpha)
        i2t, i2t_right = contrast(image, teacher_image, keys.text)
        t2i, t2i_right = contrast(text, teacher_text, keys.image)
        count = i2t.detach().new_tensor(len(ids))
        out.values["itc/temperature"] = temperature.detach()
        loss = self.collector.global_mean((i2t + t2i) / 2, count)
        self.record(out, "itc", (loss, {"i2t_accuracy": (i2t_right, count), "t2i_accuracy": (t2i_right, count)}))

    def add_texts(self, out: StepOutput, batch: Batch, image_BSD: Tensor, negatives: Negatives | None) -> None:
        """Records all losses, from one walk of all texts: those that are read alone, texts with a wrong image, matched pairs,
        wrong texts with an image, texts to be written. In two walks every weight's gradient of one would wait for the other's."""
        config, ids_BL, lengths_B = self.config, batch["text_ids"], batch["text_masks"].sum(1)
        pairs, alone = len(ids_BL), len(ids_BL) if "itc" in self.tasks else 0
        images, looks = image_BSD, []
        texts, lengths = ([ids_BL], [lengths_B]) if alone else ([], [])
        if negatives:
            wrong_ids_BL, wrong_lengths_B = self.wrong_texts(batch, negatives)
            if self.collector.world_size > 1:
                images = torch.cat((image_BSD, self.collector.fetch(image_BSD, negatives.image_B)))
                picked = torch.arange(pairs, 2 * pairs, device=ids_BL.device)
            else:
                picked = negatives.image_B
            texts += [begun_with(config.encode_word, ids) for ids in (ids_BL, ids_BL, wrong_ids_BL)]
            lengths += [lengths_B, lengths_B, wrong_lengths_B]
            looks.append(Look(0, 1, picked))
        decoded = pairs if "lm" in self.tasks else 0
        if decoded:  # a text's last word has none after it
            texts.append(begun_with(config.decode_word, ids_BL))
            lengths.append(lengths_B - 1)
        if own := 2 * bool(negatives) + bool(decoded):  # runs of texts that look at their own images
            rows = None if len(images) == pairs else torch.arange(pairs, device=ids_BL.device)
            looks.append(Look(pairs if negatives else 0, own, rows))
        longest = max(ids.shape[1] for ids in texts)
        ids_RL = torch.cat([F.pad(ids, (0, longest - ids.shape[1])) for ids in texts])
        decoder = self.text_decoder.attention if decoded else ()
        x_ND, fold = self.text_encoder(
            ids_RL, torch.cat(lengths), images if looks else None, looks, decoder, decoded, alone
        )
        first_RD = self.text_encoder.first_tokens(x_ND, fold)
        if alone:
            image, text = unit(self.vision_proj(image_BSD[:, 0])), unit(self.text_proj(first_RD[:alone]))
            self.add_contrast_with_keys(out, batch, image, text)
        if negatives:
            wrong_image, matched, wrong_text = self.itm_head(first_RD[alone : alone + 3 * pairs]).chunk(3)
            self.record(out, "itm", itm_loss(torch.cat((matched, wrong_image, wrong_text)), self.collector))
        if decoded:
            self.add_captions(out, batch, x_ND, lengths_B)

    def add_captions(self, out: StepOutput, batch: Batch, x_ND: Tensor, lengths_B: Tensor) -> None:
        """Records lm. x_ND: ends with the tokens of every word but the last of each text."""
        ids_BL, table = batch["text_ids"], self.text_encoder.embeddings.word_embeddings
        following_N = ids_BL[:, 1:][before_last(lengths_B, ids_BL.shape[1])]
        learned_N = learned_words(lengths_B, ids_BL.shape[1], batch.get("prompt_words"))
        x_ND, following_N = chosen(learned_N, x_ND[len(x_ND) - len(following_N) :], following_N)
        total, right = self.text_decoder.predictions(x_ND, table, following_N, self.config.label_smoothing)
        words = total.detach().new_tensor(len(following_N))
        self.record(out, "lm", (self.collector.global_mean(total, words), {"accuracy": (right, words)}))

    # ---- wrong pairs ----

    @torch.no_grad()
    def negatives(self, batch: Batch, image_BSD: Tensor) -> Negatives:
        """Wrong pairs, drawn by the features of encoded images and of texts, which are read here."""
        if "negative_image_index" in batch:  # recorded negatives, for parity checks
            return Negatives(batch["negative_image_index"], batch["negative_text_index"])
        return self.drawn(batch, unit(self.vision_proj(image_BSD[:, 0])), self.encode_text(batch)["text"])

    @torch.no_grad()
    def drawn(self, batch: Batch, image: Tensor, text: Tensor) -> Negatives:
        """A wrong image for each text, then a wrong text for each image, among the pairs of all ranks; queries are online features
        [B, E], candidates the teacher's."""
        part, seed = int(batch.get("part", 0)), int(batch["negative_seed"])
        scale = 1 / self.temperature()
        ids = (
            batch["sample_id"],
            batch["keys_sample_id"][part],
            batch["image_id"],
            batch["keys_image_id"][part],
        )
        return Negatives(
            sample_negatives(text, batch["keys_image"][part], scale, Draw(2 * seed, *ids), FLOOR),
            sample_negatives(image, batch["keys_text"][part], scale, Draw(2 * seed + 1, *ids), FLOOR),
        )

    def wrong_texts(self, batch: Batch, negatives: Negatives) -> tuple[Tensor, Tensor]:
        """(ids [B, L], lengths [B]) of the wrong text of each image."""
        length = self.config.max_text_len  # ranks trim their texts differently; rows that travel have one shape
        ids_BL = F.pad(batch["text_ids"], (0, length - batch["text_ids"].shape[1]))
        lengths_B = batch["text_masks"].sum(1)
        ids_BL, lengths_B = self.collector.exchange([ids_BL, lengths_B], [negatives.text_B, negatives.text_B])
        return ids_BL[:, : int(lengths_B.max())], lengths_B

    # ---- the teacher and the queue ----

    @torch.no_grad()
    def follow(self) -> None:
        """The teacher makes one step towards the student: for weights that no engine has taken."""
        for teacher, student in self.followed().items():
            self.get_parameter(teacher).lerp_(self.get_parameter(student), 1 - self.config.momentum)

    @torch.no_grad()
    def keys(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's features of a micro-batch [B, E], of unit length and float32 at least, and its ids [B]."""
        image = self.vision_proj_m(self.visual_encoder_m(self.pixels(batch["image"]))[:, 0])
        text_ND, fold = self.text_encoder_m(batch["text_ids"], batch["text_masks"].sum(1))
        text = self.text_proj_m(self.text_encoder_m.first_tokens(text_ND, fold))
        return {
            "image": unit(image),
            "text": unit(text),
            "image_id": batch["image_id"],
            "sample_id": batch["sample_id"],
        }

    @property
    def looks_ahead(self) -> bool:
        return "itc" in self.tasks

    def keys_of_step(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `step` asks of the keys of all micro-batches of an optimiser's step: keys_image, keys_text [P, G, E],
        keys_image_id, keys_sample_id [P, G], of P micro-batches with the G pairs of all ranks."""
        return {
            f"keys_{name}": torch.stack([self.collector.gather(part[name]) for part in parts])
            for name in ("image", "text", "image_id", "sample_id")
        }

    def all_keys(self, batch: Batch) -> Keys:
        """Those of the step's pairs and those of the queue."""
        image, text, ids = (batch[f"keys_{name}"].flatten(0, 1) for name in ("image", "text", "image_id"))
        queued = self.idx_queue[0]
        if "step" in batch and int(batch["step"]) < self.config.queue_warmup_steps:
            queued = torch.full_like(queued, EMPTY)
        return Keys(
            (image.t(), self.image_queue.to(image.dtype)),
            (text.t(), self.text_queue.to(text.dtype)),
            torch.cat((ids, queued)),
            torch.cat((torch.ones_like(ids, dtype=torch.bool), queued != EMPTY)),
        )

    @torch.no_grad()
    def push(self, keys: Mapping[str, Tensor]) -> None:
        """The keys of a step, in the order of their samples, take the places of the oldest. Those that are not finite are left out."""
        image, text, ids = (keys[f"keys_{name}"].flatten(0, 1) for name in ("image", "text", "image_id"))
        order = keys["keys_sample_id"].flatten().argsort(stable=True)
        finite = (image.isfinite().all(1) & text.isfinite().all(1))[order]
        order = order[finite]
        size = self.idx_queue.shape[1]
        places = (self.queue_ptr + torch.arange(len(order), device=order.device)) % size
        self.image_queue[:, places] = image[order].t().to(self.image_queue.dtype)
        self.text_queue[:, places] = text[order].t().to(self.text_queue.dtype)
        self.idx_queue[0, places] = ids[order]
        self.queue_ptr.add_(len(order)).remainder_(size)

    def temperature(self) -> Tensor:
        """0-d, float32 at least: within its bounds, past which the value stays and the gradient still flows."""
        temp = wide(self.temp.reshape(()))
        return temp - (temp - temp.clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)).detach()

    def alpha(self, batch: Batch) -> float:
        steps = self.config.alpha_warmup_steps
        return self.config.alpha * (min(1.0, int(batch["step"]) / steps) if steps and "step" in batch else 1.0)

    def idle(self) -> list[str]:
        """Patterns of what none of the tasks reaches."""
        if {"itm", "lm"} & self.tasks.keys():
            return [] if {"itc", "itm"} & self.tasks.keys() else ["text_encoder.encoder.layer.*.attention.*"]
        return ["text_encoder.encoder.layer.*.crossattention.*"]

    # ---- evaluation ----

    def encode_patches(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> its patches' encodings [B, P, D], row by row."""
        return self.visual_encoder(self.pixels(batch["image"]))[:, 1:]

    def encode_image(self, batch: Batch) -> dict[str, Tensor]:
        """image [B, 3, S, S] -> contrastive features image [B, E], of unit length."""
        return {"image": unit(self.vision_proj(self.visual_encoder(self.pixels(batch["image"]))[:, 0]))}

    def encode_text(self, batch: Batch) -> dict[str, Tensor]:
        """text_ids, text_masks [B, L] -> contrastive features text [B, E], of unit length."""
        x_ND, fold = self.text_encoder(batch["text_ids"], batch["text_masks"].sum(1))
        return {"text": unit(self.text_proj(self.text_encoder.first_tokens(x_ND, fold)))}

    def match(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B pairs -> [B] log-odds that they match."""
        logits = wide(self.matched(*self.read(batch), self.visual_encoder(self.pixels(batch["image"]))))
        return logits[:, 1] - logits[:, 0]

    def matched(self, ids_BL: Tensor, lengths_B: Tensor, image_BSD: Tensor) -> Tensor:
        """Texts that begin with [ENC] and encoded images -> [B, 2] logits, index 1 = matched."""
        x_ND, fold = self.text_encoder(ids_BL, lengths_B, image_BSD, [Look(0, 1)])
        return self.itm_head(self.text_encoder.first_tokens(x_ND, fold))

    def written(self, ids_BL: Tensor, lengths_B: Tensor, image_BSD: Tensor) -> Tensor:
        """Texts and encoded images -> logits [N, V] of the words after every word but each text's last."""
        ids_BL = begun_with(self.config.decode_word, ids_BL)
        decoder, pairs = self.text_decoder, len(ids_BL)
        x_ND, _ = self.text_encoder(ids_BL, lengths_B - 1, image_BSD, [Look(0, 1)], decoder.attention, pairs)
        return decoder.predictions(x_ND, self.text_encoder.embeddings.word_embeddings)

    def caption_image(self, batch: Batch) -> list[Memory]:
        """image [B, 3, S, S] -> what caption_step needs of it, computed once."""
        return self.text_encoder.memory(self.visual_encoder(self.pixels(batch["image"])))

    def caption_step(self, batch: Mapping[str, Any]) -> Tensor:
        """text_ids [R, L] int64, the newest words of R = n * B texts, n for each of B images; first: words before them;
        memory: of caption_image; cache: Cache -> logits [R, V] of the word after the newest. Texts begin with [DEC], whatever
        their first word."""
        decoder = self.text_decoder
        ids_RL, first = self.newest(batch), batch["first"]
        x_RLD = self.text_encoder.step(ids_RL, first, batch["memory"], decoder.attention, batch["cache"])
        return decoder.predictions(x_RLD[:, -1], self.text_encoder.embeddings.word_embeddings)

    def contrast_scale(self) -> Tensor:
        return 1 / self.temperature().detach().float()


def student_of(name: str) -> str | None:
    """The student's tensor that a teacher's follows; None for other names."""
    for teacher, student in AVERAGED.items():
        if name.startswith(teacher):
            return student + name.removeprefix(teacher)
    return None
