"""Visual tokens of shards' images, made before training (`vlmo tokenize`): of each shard one file, with the codes of every image's patches.

FOLDER/<shard>.tokens.safetensors     tokens [samples, P] uint16, patches row by row; keys [samples] uint64, by which a sample is known;
                                      as metadata the tokenizer's checksum, its number of codes and its images' size
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlmo_ds.data.shards import RawSample, Shard
from vlmo_ds.data.storage import DataError, write_atomically

SUFFIX = ".tokens.safetensors"
UNREAD = 0  # the key of a sample whose image could not be read; its tokens are zero


class Origin(NamedTuple):
    """What tokens were made by: the tokenizer's checksum, its number of codes, pixels of an image's side."""

    tokenizer: str
    codes: int
    image_size: int


def file_of(folder: str | Path, shard: Shard) -> Path:
    """Where a shard's tokens are."""
    return Path(folder) / (Path(urlsplit(shard.url).path).name.removesuffix(".tar") + SUFFIX)


def key_of(raw: RawSample) -> int:
    """A hash of a sample's key and picture, above 0. The picture is in it since many sets number their samples alike."""
    return int.from_bytes(hashlib.blake2b(raw.key.encode() + b"\0" + raw.image, digest_size=8).digest(), "big") or 1


def write(file: Path, tokens_NP: np.ndarray, keys_N: np.ndarray, origin: Origin) -> None:
    """tokens_NP: [samples, P] of any integers below 65,536; keys_N: of key_of, or UNREAD."""
    about = {name: str(value) for name, value in origin._asdict().items()}
    tables: dict[str, np.ndarray] = {"tokens": tokens_NP.astype(np.uint16), "keys": keys_N.astype(np.uint64)}
    write_atomically(file, save(tables, about))


class TokensOfShard:
    """A shard's file, opened. DataError where there is none, or it cannot be used."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.handle: Any = safe_open(file, "numpy")
            about = self.handle.metadata() or {}
            self.origin = Origin(about["tokenizer"], int(about["codes"]), int(about["image_size"]))
            self.keys_N: np.ndarray = self.handle.get_tensor("keys")
            self.rows = self.handle.get_slice("tokens")
            self.shape = tuple(self.rows.get_shape())
        except FileNotFoundError:
            raise DataError(f"data.visual_tokens: {file} does not exist; `vlmo tokenize` makes it") from None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(
                f"data.visual_tokens: {file} cannot be read as visual tokens ({type(error).__name__}: {str(error)[:200]})"
            ) from None

    def fits(self, shard: Shard) -> bool:
        """Whether it was made of this shard, as far as the first and the last sample tell."""
        if len(self.keys_N) != shard.samples:
            return False
        for row in (0, shard.samples - 1):
            try:
                key = key_of(shard.read(row))
            except DataError:
                key = UNREAD
            if self.keys_N[row] not in (key, UNREAD):
                return False
        return True

    def of(self, row: int, raw: RawSample) -> np.ndarray:
        """[P] int64, of one sample."""
        if self.keys_N[row] == UNREAD:
            raise DataError(
                f"{raw.name} has no visual tokens in {self.file}: its image could not be read when they were made"
            )
        if self.keys_N[row] != key_of(raw):
            raise DataError(
                f"{raw.name}: {self.file} was made of another shard of this name: give each folder of shards its own folder of tokens"
            )
        return self.rows[row : row + 1][0].astype(np.int64)


@lru_cache(maxsize=4096)
def opened(file: Path) -> TokensOfShard:
    return TokensOfShard(file)


def check(folder: str, shards: Sequence[Shard], image_size: int, patches: int) -> Origin:
    """What the tokens of these shards were made by. DataError where they are of several tokenizers, or do not fit shards and images."""
    first: TokensOfShard | None = None
    for shard in shards:
        file = file_of(folder, shard)
        found = opened(file)
        if found.shape != (shard.samples, patches) or len(found.keys_N) != shard.samples:
            raise DataError(
                f"data.visual_tokens: {file} has tokens of {found.shape[0]} images of {found.shape[-1]} patches, and {shard.url} {shard.samples} of "
                f"{patches} patches: make them again"
            )
        if found.origin.image_size != image_size:
            raise DataError(
                f"data.visual_tokens: {file} was made of images of {found.origin.image_size} pixels a side, and image_size is {image_size}"
            )
        if first and found.origin != first.origin:
            raise DataError(
                f"data.visual_tokens: {file} and {first.file} are of two tokenizers (checksums {found.origin.tokenizer} and "
                f"{first.origin.tokenizer})"
            )
        first = first or found
    if first is None:
        raise DataError(f"data.visual_tokens: {folder} is for no shard")
    return first.origin
