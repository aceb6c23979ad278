"""What the families' transformers classes share: configurations, processors, and how an exported folder is written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import ModelOutput

from vlmo_ds.blocks.layers import init_weights
from vlmo_ds.config import ModelConfig, RecipeError
from vlmo_ds.data.transforms import EncodedImage, pixels, resized, square, upright_pixels
from vlmo_ds.families.interface import Pixels


class FamilyConfig(PreTrainedConfig):
    """The values of a family's settings; tasks: those that the weights were trained for."""

    settings_class: ClassVar[type[ModelConfig]]

    def __init__(self, tasks: Sequence[str] = (), **kwargs: Any):
        known = {name: kwargs.pop(name) for name in self.settings_class.model_fields if name in kwargs}
        self.tasks = list(tasks)
        # every value as the check of the settings leaves it: sizes that do not fit raise here
        for name, value in self.settings_class(**known).model_dump().items():
            setattr(self, name, value)
        super().__init__(**kwargs)

    @property
    def settings(self) -> Any:
        """The family's settings."""
        return self.settings_class(**{name: getattr(self, name) for name in self.settings_class.model_fields})


@dataclasses.dataclass
class RetrievalOutput(ModelOutput):
    """logits_per_image [images, texts] and logits_per_text its transpose; image_embeds, text_embeds of unit length."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclasses.dataclass
class ClassificationOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


class PairModel(PreTrainedModel):
    """A model of texts and images. Its network is a family's, under the name base_model_prefix."""

    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config.init_std)

    def texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """text_ids and text_masks of the network's batches."""
        raise NotImplementedError


class RetrievalModel(PairModel):
    """Contrastive features, and where the weights have it the head that scores pairs (`match`)."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, D], of unit length."""
        return self.base_model.encode_image({"image": pixel_values})["image"]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, L] -> [B, D], of unit length."""
        return self.base_model.encode_text(self.texts(input_ids, attention_mask))["text"]

    @property
    def contrast_scale(self) -> float:
        """What cosines of image and text features are multiplied with."""
        return float(self.base_model.contrast_scale())

    def match(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B] log-odds that each text fits its image. ValueError without an itm head."""
        if not self.base_model.gives("match"):
            raise ValueError(f"this model has no itm head; it was trained for {', '.join(self.config.tasks)}")
        return self.base_model.match({**self.texts(input_ids, attention_mask), "image": pixel_values})

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> RetrievalOutput:
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        logits = self.base_model.logit_scale.exp() * image @ text.t()
        if self.base_model.logit_bias is not None:  # of SigLIP's loss, by which a logit is the log-odds of a pair
            logits = logits + self.base_model.logit_bias
        return RetrievalOutput(logits, logits.t(), image, text)


class Classifier(PairModel):
    """What the two classifiers share. Subclasses: their logits and their loss."""

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> ClassificationOutput:
        """input_ids, attention_mask [B, L]; pixel_values, logits and labels as the class says."""
        logits = self.logits(self.texts(input_ids, attention_mask), pixel_values)
        return ClassificationOutput(None if labels is None else self.loss(logits, labels), logits)

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class AnswerClassifier(Classifier):
    """Logits [B, answers] over a fixed list of answers, config.id2label, from pixel_values [B, 3, S, S].

    labels [B, answers]: soft targets in [0, 1]; the loss is summed over the answers.
    """

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        return self.base_model.answer({**texts, "image": pixel_values})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)


class ImagePairClassifier(Classifier):
    """Is a sentence true of two images? Logits [B, 2], index 1 = true, from pixel_values [B, 2, 3, S, S].

    labels [B] int64.
    """

    def logits(self, texts: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; accepted: [B, 2, 3, S, S], two images a text"
            )
        return self.base_model.compare({**texts, "image_0": pixel_values[:, 0], "image_1": pixel_values[:, 1]})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


class ImageClassifier(PairModel):
    """Logits [B, classes] of images alone."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ClassificationOutput:
        """pixel_values [B, 3, S, S]; labels [B] int64."""
        logits = self.base_model.classify({"image": pixel_values})
        return ClassificationOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def as_image(pixels_HWC: np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(pixels_HWC)
    except TypeError:
        raise ValueError(
            f"images: an array of shape {list(pixels_HWC.shape)} and type {pixels_HWC.dtype}; accepted: [height, width, 3], "
            "uint8"
        ) from None


class SquareImageProcessor(BaseImageProcessor):
    """Images to pixel_values [B, 3, S, S]: resized to a square and normalised, as in this project's evaluations.

    Takes paths, encoded bytes, Pillow images and [H, W, 3], [H, W, 4] or [H, W] uint8 arrays. Paths and bytes give the
    pixels of training and evaluation to the bit. Of Pillow's images a large JPEG differs slightly: it was decoded at its
    full size. All are upright as their EXIF orientation says, with transparency on white and grey of 16 bits scaled to 8.
    """

    model_input_names = ["pixel_values"]
    normalised_by: ClassVar[Pixels]  # the family's

    def __init__(self, size: int = 224, **kwargs: Any):
        super().__init__(**kwargs)
        self.size = size

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """One image or a list of them; of lists of images (NLVR2's pairs) a [B, 2, 3, S, S]."""
        if not isinstance(images, (list, tuple)):
            images = [images]
        if images and isinstance(images[0], (list, tuple)):
            values = np.stack([np.stack([self.one(image) for image in group]) for group in images])
        else:
            values = np.stack([self.one(image) for image in images])
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def one(self, image: Any) -> np.ndarray:
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            made = square(EncodedImage(image), self.size, np.random.default_rng(0))
        else:
            whole = image if isinstance(image, Image.Image) else as_image(np.asarray(image))
            made = resized(upright_pixels(whole), self.size, self.size)
        mean, std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in self.normalised_by)
        return (pixels(made).astype(np.float32) / 255 - mean) / std


class PairProcessor(ProcessorMixin):
    """Image processor and tokenizer in one: processor(images=..., text=...)."""

    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"
    if int(transformers.__version__.split(".")[0]) < 5:  # from 5 on known by the registration below
        image_processor_class = "AutoImageProcessor"

    def __init__(self, image_processor: SquareImageProcessor, tokenizer: Any, max_text_len: int = 40, **kwargs: Any):
        self.max_text_len = max_text_len
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        found: dict[str, Any] = {}
        if text is not None:
            settings: Mapping[str, Any] = {
                "padding": True,
                "truncation": True,
                "max_length": self.max_text_len,
                **kwargs,
            }
            encoded = self.tokenizer(
                [text] if isinstance(text, str) else text, return_tensors=return_tensors, **settings
            )
            found |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if images is not None:
            found |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(found)


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives a network the weights of its names; further ones are left out. RecipeError where one is missing."""
    own = network.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise RecipeError(f"the weights have no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}")
    network.load_state_dict({name: weights[name] for name in own})


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name in one rename when all of it is there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(folder)


def name_answers(config: PreTrainedConfig, answers: Sequence[str] | None) -> None:
    """Gives a configuration the answers that its model chooses among."""
    if answers:
        config.id2label = dict(enumerate(answers))
        config.label2id = {answer: number for number, answer in enumerate(answers)}


def write(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Writes both into a folder, in one rename."""
    with appearing(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
