"""BEiT-3 as Hugging Face models: importing this module makes them known to the Auto classes.

    import vlmo_ds.interop.huggingface  # the classes of every family
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)

FOLDER is what `python -m vlmo_ds.interop.export` writes. Neither DeepSpeed nor a process group is needed. A model that writes captions has no
class: `python -m vlmo_ds.interop.export --official` gives its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from vlmo_ds.config import RecipeError
from vlmo_ds.families.beit3.backbone import Stream
from vlmo_ds.families.beit3.config import PIXELS, BEiT3Settings
from vlmo_ds.families.beit3.model import BEiT3, every
from vlmo_ds.families.huggingface import (
    AnswerClassifier,
    FamilyConfig,
    ImageClassifier,
    ImagePairClassifier,
    PairModel,
    PairProcessor,
    RetrievalModel,
    SquareImageProcessor,
    fill,
    name_answers,
    write,
)

RETRIEVAL = ("itc", "itm", "irtr")


class BEiT3Config(FamilyConfig):
    """BEiT3Settings' values; id2label: VQA's answers."""

    model_type = "beit3"
    attribute_map = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    settings_class = BEiT3Settings


class BEiT3PreTrainedModel(PairModel):
    """All classes keep the network under the name `network`, with its official parameter names."""

    config_class = BEiT3Config
    base_model_prefix = "network"
    _keys_to_ignore_on_load_unexpected = [r"network\..*"]  # heads that a class does not have

    def __init__(self, config: BEiT3Config, tasks: Sequence[str]):
        super().__init__(config)
        self.network = BEiT3(config.settings, dict.fromkeys(tasks, 1.0))
        self.post_init()

    def texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return {"text_ids": input_ids, "text_masks": mask}


class BEiT3Model(BEiT3PreTrainedModel):
    """The encoder: of a text, an image, or an image with a text."""

    def __init__(self, config: BEiT3Config):
        super().__init__(config, ())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """input_ids, attention_mask [B, L] and pixel_values [B, 3, S, S] -> last_hidden_state [B, image and text tokens, D],
        image first."""
        if input_ids is None and pixel_values is None:
            raise ValueError("BEiT3Model needs input_ids, pixel_values or both")
        stream = Stream(None if pixel_values is None else every(pixel_values))
        if input_ids is not None:
            batch = self.texts(input_ids, attention_mask)
            stream = stream._replace(ids_BL=batch["text_ids"], text_mask_BL=batch["text_masks"])
        (encoded,) = self.network.beit3([stream], pixel_values)
        return BaseModelOutput(last_hidden_state=torch.cat([part for part in encoded if part is not None], dim=1))


class BEiT3ForImageTextRetrieval(BEiT3PreTrainedModel, RetrievalModel):
    __doc__ = RetrievalModel.__doc__

    def __init__(self, config: BEiT3Config):
        super().__init__(config, [task for task in config.tasks if task in RETRIEVAL] or ["irtr"])


class BEiT3ForQuestionAnswering(BEiT3PreTrainedModel, AnswerClassifier):
    __doc__ = AnswerClassifier.__doc__

    def __init__(self, config: BEiT3Config):
        super().__init__(config, ["vqa"])


class BEiT3ForImagesAndTextClassification(BEiT3PreTrainedModel, ImagePairClassifier):
    __doc__ = ImagePairClassifier.__doc__

    def __init__(self, config: BEiT3Config):
        super().__init__(config, ["nlvr2"])


class BEiT3ForImageClassification(BEiT3PreTrainedModel, ImageClassifier):
    __doc__ = ImageClassifier.__doc__

    def __init__(self, config: BEiT3Config):
        super().__init__(config, ["classification"])


class BEiT3ImageProcessor(SquareImageProcessor):
    """Of values in [-1, 1]."""

    normalised_by = PIXELS


class BEiT3Processor(PairProcessor):
    """BEiT-3's."""


def class_for(tasks: Collection[str]) -> Callable[[BEiT3Config], BEiT3PreTrainedModel]:
    if "vqa" in tasks:
        return BEiT3ForQuestionAnswering
    if "nlvr2" in tasks:
        return BEiT3ForImagesAndTextClassification
    if "classification" in tasks:
        return BEiT3ForImageClassification
    return BEiT3ForImageTextRetrieval if set(tasks) & set(RETRIEVAL) else BEiT3Model


def exported(
    weights: Mapping[str, Tensor],
    settings: BEiT3Settings,
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str] | None,
    folder: Path,
) -> BEiT3PreTrainedModel:
    """Writes the folder in one rename. Weights that no class has (heads of masked words and patches) are left out. RecipeError for a
    model that writes captions."""
    if "captioning" in tasks:
        raise RecipeError("there is no transformers class of a BEiT-3 that writes captions; accepted: --official")
    config = BEiT3Config(tasks=list(tasks), **settings.model_dump())
    name_answers(config, answers)
    if "classification" in tasks:
        config.num_labels = settings.num_classes
    model = class_for(tasks)(config).eval()
    fill(model.network, weights)
    processor = BEiT3Processor(BEiT3ImageProcessor(size=settings.image_size), tokenizer, settings.max_text_len)
    write(folder, model, processor)
    return model


AutoConfig.register(BEiT3Config.model_type, BEiT3Config)
AutoModel.register(BEiT3Config, BEiT3Model)
AutoModelForImageClassification.register(BEiT3Config, BEiT3ForImageClassification)
AutoModelForVisualQuestionAnswering.register(BEiT3Config, BEiT3ForQuestionAnswering)
AutoModelForZeroShotImageClassification.register(BEiT3Config, BEiT3ForImageTextRetrieval)
AutoImageProcessor.register(BEiT3Config, BEiT3ImageProcessor)
AutoProcessor.register(BEiT3Config, BEiT3Processor)
