"""A very small VLMo whose weights all matter, and a batch for it."""

import torch

from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.model import VLMo

JOINT = {"mlm": 0.25, "itc": 1.0, "itm": 1.0}


def tiny_model(tasks=JOINT, dtype=torch.float64, **changes) -> VLMo:
    torch.manual_seed(1)
    settings = {
        "embed_dim": 32, "depth": 4, "num_heads": 4, "vlffn_start_layer_index": 2, "image_size": 32, "patch_size": 8,
        "max_text_len": 24, "max_text_len_of_initckpt": 24, "vocab_size": 50,
    }  # fmt: skip
    model = VLMo(VLMoSettings(**settings | changes), tasks).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.text_embeddings.word_embeddings.weight[0].zero_()
    return model


def tiny_batch(batch: int = 5, length: int = 16, dtype=torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length - 3, (batch,), generator=g)
    masks = (torch.arange(length)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 50, (batch, length), generator=g) * masks
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    masked = ids.clone()
    masked[:, 2] = 4
    return {
        "text_ids": ids,
        "text_masks": masks,
        "text_ids_mlm": masked,
        "text_labels_mlm": labels,
        "image": torch.randn(batch, 3, 32, 32, generator=g, dtype=torch.float64).to(dtype),
        "image_mask": torch.rand(batch, 16, generator=g) < 0.4,
        "image_id": torch.arange(batch) + 100 * seed,
        "sample_id": torch.arange(batch) + 100 * seed,
        "negative_seed": torch.tensor(3),
        "step_seed": torch.tensor(7),
    }
