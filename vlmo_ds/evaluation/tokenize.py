"""Visual tokens of shards' images, by a finished tokenizer, so that training on them need not run it.

    python -m vlmo_ds.evaluation.tokenize RUN --shards PATTERN ... --output FOLDER [--batch_size N] [--workers N]

RUN is a run of a visual tokenizer, or a stage's final folder inside it. FOLDER gets a file for each shard (data/visual_tokens.py), which
a recipe names as data.visual_tokens, and codes.png: of some codes the patches that are nearest to them. Images are whole, resized to a
square, as with the transform square_transform. Files that are there already, of this tokenizer, stay. Under torchrun each rank takes
its share of the shards.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmo_ds.config import RecipeError, number
from vlmo_ds.data import visual_tokens
from vlmo_ds.data.shards import RawSample, Shard, list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.visual_tokens import UNREAD, Origin, TokensOfShard, file_of, key_of
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.evaluation.runs import Samples, examples_in_batches, square_pixels
from vlmo_ds.families.finished import find_stage, load_model
from vlmo_ds.families.outside import digest_of
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.objectives.quantize import perplexity

CALL = "tokenize"
SHEET = "codes.png"
SHOWN, PATCHES_SHOWN, LOOKED_AT = (
    24,
    12,
    1024,
)  # codes of the contact sheet, patches of each, images they are looked for in
TILE = 32  # pixels of a patch there


def main() -> None:
    parser = runs.parser(__doc__, "shards whose images get tokens", "the folder for their tokens")
    parser.add_argument(
        "--batch_size", type=number(int), default=256, help="images of a forward pass (default: %(default)s)"
    )
    parser.add_argument("--workers", type=number(int, 0), default=0, help="loader processes (default: %(default)s)")
    args = parser.parse_args()
    if not args.shards or not args.output:
        raise RecipeError("name the shards with --shards, and a folder for their tokens with --output")
    _, recipe, folder = find_stage(args.run, CALL, args.weights)
    shards = list_shards(args.shards)
    model = load_model(recipe, folder)
    if torch.cuda.is_available():
        model.cuda(int(os.environ.get("LOCAL_RANK", "0")))
    config: Any = model.config
    origin = Origin(digest_of(str(folder)), config.num_codes, config.image_size)
    names = [file_of(args.output, shard) for shard in shards]
    if twice := next((file for file in names if names.count(file) > 1), None):
        raise RecipeError(
            f"--output: two shards would have the file {twice}: give each folder of shards its own folder of tokens"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--output: {args.output} cannot be a folder for the tokens: {error.strerror}") from None
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    counts = torch.zeros(origin.codes, dtype=torch.int64)
    for shard in shards[rank::ranks]:
        file = file_of(args.output, shard)
        if not file.exists():
            tokenize(model, shard, file, origin, args.batch_size, args.workers)
        elif (found := TokensOfShard(file)).origin != origin or not found.fits(shard):
            whose = "shard" if found.origin == origin else "tokenizer"
            raise RecipeError(
                f"--output: {file} is there already, and of another {whose}: name another folder, or delete it"
            )
        counts += torch.bincount(torch.from_numpy(read(file)).flatten(), minlength=origin.codes)
    images = int(counts.sum()) // model.config.patches
    used = int((counts > 0).sum())
    print(
        f"{args.output}: tokens of {images} images in {len(shards[rank::ranks])} shards; {used} of {origin.codes} codes are used, perplexity "
        f"{float(perplexity(counts.double())):.1f}; the tokenizer's checksum is {origin.tokenizer}"
    )
    if rank == 0:
        sheet = args.output / SHEET
        write_atomically(sheet, contact_sheet(model, shards, counts, args.batch_size))
        print(f"{sheet}: patches of {min(SHOWN, used)} codes")


def read(file: Path) -> np.ndarray:
    """The tokens of a shard's images that could be read, [N, P] int64."""
    found = TokensOfShard(file)
    return found.handle.get_tensor("tokens")[found.keys_N != UNREAD].astype(np.int64)


@torch.no_grad()
def tokenize(model: FamilyModel, shard: Shard, file: Path, origin: Origin, batch: int, workers: int) -> None:
    """Writes the tokens of a shard's images; those that cannot be read are told of."""
    size, device = model.config.image_size, next(model.parameters()).device

    def make(raw: RawSample) -> list[dict]:
        return [{"image": square_pixels(raw.image, size, raw.name), "key": key_of(raw)}]

    def unread(error: DataError) -> list[dict]:
        return [{"image": torch.zeros(3, size, size, dtype=torch.uint8), "key": UNREAD, "error": str(error)}]

    tokens: list[np.ndarray] = []
    keys: list[int] = []
    for examples in examples_in_batches(
        Samples([shard], make, Collector(), unread), batch, workers, f"tokenizing {Path(shard.url).name}"
    ):
        for example in examples:
            if "error" in example:
                print(f"warning: {example['error']}: it has no tokens", flush=True)
        found = model({"image": torch.stack([e["image"] for e in examples]).to(device)}, CALL).cpu().numpy()
        keys += [e["key"] for e in examples]
        tokens.append(np.where((np.array([e["key"] for e in examples]) == UNREAD)[:, None], 0, found))
    if all(key == UNREAD for key in keys):
        raise DataError(f"{shard.url} has no image that can be read")
    visual_tokens.write(file, np.concatenate(tokens), np.array(keys, dtype=np.uint64), origin)


@torch.no_grad()
def contact_sheet(model: FamilyModel, shards: list[Shard], counts_K: Tensor | None = None, batch: int = 64) -> bytes:
    """A PNG: in each row the patches that are nearest to one code, of codes from the most to the least used, among some images.
    counts_K: how often each code is used; None: by these images. Nothing where none of the images can be read."""
    side = model.config.patch_size
    device = next(model.parameters()).device
    images, codes, near = [], [], []
    places = [(shard, row) for shard in shards for row in range(shard.samples)]
    chosen = [places[n] for n in np.unique(np.linspace(0, len(places) - 1, min(LOOKED_AT, len(places))).astype(int))]
    for first in range(0, len(chosen), batch):
        heartbeat.beat("a picture of the codes")
        pictures = []
        for shard, row in chosen[first : first + batch]:
            try:
                raw = shard.read(row)
                pictures.append(square_pixels(raw.image, model.config.image_size, raw.name))
            except DataError:
                continue
        if pictures:
            inputs = {"image": torch.stack(pictures).to(device)}
            images.append(inputs["image"].cpu())
            code, nearness = model(inputs, "nearness")
            codes.append(code.cpu())
            near.append(nearness.float().cpu())
    if not images:
        return b""
    image, code_N, near_N = torch.cat(images), torch.cat(codes).flatten(), torch.cat(near).flatten()
    patch_NCHW = image.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    if counts_K is None:
        counts_K = code_N.bincount()
    used = counts_K.argsort(descending=True)[: int((counts_K > 0).sum())]
    rows = used[np.unique(np.linspace(0, len(used) - 1, min(SHOWN, len(used))).astype(int))].tolist()
    sheet = Image.new("RGB", (PATCHES_SHOWN * (TILE + 2), max(len(rows), 1) * (TILE + 2)), "white")
    for line, code in enumerate(rows):
        mine = (code_N == code).nonzero()[:, 0]
        for column, one in enumerate(mine[near_N[mine].argsort(descending=True)][:PATCHES_SHOWN]):
            tile = Image.fromarray(patch_NCHW[one].permute(1, 2, 0).numpy()).resize(
                (TILE, TILE), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (column * (TILE + 2), line * (TILE + 2)))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


if __name__ == "__main__":
    raise SystemExit(runs.command(main))
