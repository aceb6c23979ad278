"""BLIP for questions and for pairs of images (arXiv:2201.12086, section 5.3 and 5.4, figure 5): fine-tuned alone, from pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.blip.base import BLIPModel, begun_with
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.families.blip.text import AnswerDecoder, Look, Memory, at_two_images
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.objectives.captioning import before_last
from vlmo_ds.objectives.classification import classification_loss

RANKED_WORDS = 4096  # whose logits are in memory at a time when answers are ranked


class BLIPForQuestions(BLIPModel):
    """Task vqa: the text stack reads a question with its image, a decoder with weights of its own writes the answer from the
    question's states."""

    def __init__(self, config: BLIPSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        self.text_decoder = AnswerDecoder(config, self.recomputed)
        self.reset_parameters()

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (gives StepOutput); answer, read_question, answer_step (for evaluation)."""
        return {
            "step": self.step,
            "answer": self.answer,
            "read_question": self.read_question,
            "answer_step": self.answer_step,
        }[call](batch)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """image [B, 3, S, S], text_ids, text_masks [B, L] -> (states [B, L, D] of the questions' words, bool [B, L]: which there
        are). With question_image [B] int64 in the batch, images are fewer, and each question is about that one."""
        look = Look(0, 1, batch.get("question_image"))
        x_ND, fold = self.text_encoder(*self.read(batch), self.visual_encoder(self.pixels(batch["image"])), [look])
        return fold.padded(x_ND), fold.valid_BL

    def step(self, batch: Batch) -> StepOutput:
        """The weighted loss: of a question the mean over its annotators of their answer's word losses, summed over its words
        (label smoothing included); over the questions of the global batch the mean.

        batch: as states', and answer_ids [B, K, W] of at most K different answers
        each, answer_lengths [B, K] int64 (0: no answer), answer_weights [B, K] (the share of annotators who gave it).
        """
        out = StepOutput.empty()
        states_BLD, valid_BL = self.states(batch)
        given_BK = batch["answer_lengths"] > 0
        ids_AW, lengths_A = batch["answer_ids"][given_BK], batch["answer_lengths"][given_BK]
        look = Look(0, 1, given_BK.nonzero()[:, 0], valid_BL)
        hidden_ND = self.text_decoder.hidden(self.written(ids_AW), lengths_A - 1, states_BLD, look)
        following_N = ids_AW[:, 1:][before_last(lengths_A, ids_AW.shape[1])]
        weight_N = batch["answer_weights"][given_BK].repeat_interleave(lengths_A - 1)
        total, right = self.text_decoder.words(hidden_ND, following_N, self.config.label_smoothing, weight_N)
        questions, words = total.detach().new_tensor(len(valid_BL)), total.detach().new_tensor(len(following_N))
        self.record(out, "vqa", (self.collector.global_mean(total, questions), {"accuracy": (right, words)}))
        return out._replace(loss=added(out.losses.values()))

    def written(self, ids_AW: Tensor) -> Tensor:
        return begun_with(self.config.decode_word, ids_AW)

    # ---- evaluation ----

    def answer(self, batch: Mapping[str, Any]) -> Tensor:
        """Log-likelihoods [B, A] of A answers to each of B questions, -inf but for the `candidates` answers whose first word is
        most likely (the reference's ranking; the likelihood is that of all words, without smoothing).

        batch: image, text_ids, text_masks of the questions; listed_ids [A, W], listed_lengths [A] of the answers; candidates.
        """
        states_BLD, valid_BL = self.states(batch)
        listed_AW, lengths_A = self.written(batch["listed_ids"]), batch["listed_lengths"]
        questions = len(states_BLD)
        begin = listed_AW[:1, :1].expand(questions, 1)
        first = Look(0, 1, None, valid_BL)
        hidden_BD = self.text_decoder.hidden(begin, torch.ones_like(begin[:, 0]), states_BLD, first)
        of_first_BA = self.text_decoder.words(hidden_BD).log_softmax(1)[:, listed_AW[:, 1]]
        best_BK = of_first_BA.topk(min(batch["candidates"], len(listed_AW)), dim=1).indices
        question_R = torch.arange(questions, device=begin.device).repeat_interleave(best_BK.shape[1])
        scores = []
        at_once = max(1, RANKED_WORDS // listed_AW.shape[1])
        for questions_R, answers_R in zip(question_R.split(at_once), best_BK.flatten().split(at_once), strict=True):
            look = Look(0, 1, questions_R, valid_BL)
            scores.append(self.likelihoods(listed_AW[answers_R], lengths_A[answers_R], states_BLD, look))
        found_BA = torch.full_like(of_first_BA, -torch.inf)
        return found_BA.scatter(1, best_BK, torch.cat(scores).view_as(best_BK))

    def likelihoods(self, ids_RW: Tensor, lengths_R: Tensor, states_BLD: Tensor, look: Look) -> Tensor:
        """[R] log-likelihoods of texts that begin with [DEC], their end included."""
        logits_NV = self.text_decoder.words(self.text_decoder.hidden(ids_RW, lengths_R - 1, states_BLD, look))
        following = before_last(lengths_R, ids_RW.shape[1])
        scores_N = logits_NV.log_softmax(1).gather(1, ids_RW[:, 1:][following][:, None])[:, 0]
        text_N = following.nonzero()[:, 0]
        return scores_N.new_zeros(len(ids_RW)).index_add(0, text_N, scores_N)

    def read_question(self, batch: Batch) -> list[Memory]:
        """image, text_ids, text_masks of B questions -> what answer_step needs of them, computed once."""
        return self.text_decoder.bert.memory(*self.states(batch))

    def answer_step(self, batch: Mapping[str, Any]) -> Tensor:
        """text_ids [R, L] int64, the newest words of R = n * B answers, n to each of B questions; first: words before them;
        memory: of read_question; cache: Cache -> logits [R, V] of the word after the newest. Answers begin with [DEC], whatever
        their first word."""
        return self.text_decoder.step(self.newest(batch), batch["first"], batch["memory"], batch["cache"])


class BLIPForImagePairs(BLIPModel):
    """Task nlvr2: the text stack looks at two images by two cross-attentions; two layers on its first word say whether the
    sentence is true."""

    crossattention = staticmethod(at_two_images)
    heads = ("cls_head.",)

    def __init__(self, config: BLIPSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        width = config.text_width
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.reset_parameters()

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (gives StepOutput); compare (for evaluation)."""
        return {"step": self.step, "compare": self.compare}[call](batch)

    def step(self, batch: Batch) -> StepOutput:
        """The weighted loss. batch: as compare's, and answers [B] int64, 1 = true."""
        out = StepOutput.empty()
        self.record(out, "nlvr2", classification_loss(self.compare(batch), batch["answers"], self.collector))
        return out._replace(loss=added(out.losses.values()))

    def compare(self, batch: Batch) -> Tensor:
        """image_0, image_1 [B, 3, S, S], text_ids, text_masks [B, L] of sentences about them -> [B, 2] logits, index 1 = true."""
        image = self.visual_encoder(self.pixels(torch.cat((batch["image_0"], batch["image_1"]))))
        x_ND, fold = self.text_encoder(*self.read(batch), image, [Look(0, 1)])
        return self.cls_head(self.text_encoder.first_tokens(x_ND, fold))
