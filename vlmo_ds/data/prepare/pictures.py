"""Pictures where people have them: beside a table, on the web, or as the bytes of a row; read within bounds."""

from __future__ import annotations

import hashlib
import math
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlmo_ds.data.prepare.writer import Rejected
from vlmo_ds.data.storage import CHUNK, DataError, opened, retried

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_BYTES = 256 << 20
FETCH_TRIES, FETCH_STALL, FETCH_SECONDS = 2, 10.0, 60.0


def picture_of(value: Any, base: str) -> bytes | Rejected:
    """The picture that a cell holds: its bytes, {bytes, path} of Hugging Face datasets, a path or an http(s) URL.

    base: the folder or URL that paths are relative to. Other URLs are refused: a table must not run a command.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        return Rejected("no image")
    value = value.strip()
    if value.startswith(("http://", "https://")):
        return fetched(value)
    if "://" in value or value.startswith("pipe:"):
        return Rejected("image is neither a path nor an http(s) URL")
    if base.startswith(("http://", "https://")):
        return fetched(f"{base.rstrip('/')}/{quote(value.lstrip('/'))}")
    return bytes_of(Path(base) / value)


def bytes_of(path: Path) -> bytes | Rejected:
    """A picture's file."""
    try:
        if not path.is_file():
            return Rejected("image file missing")
        if path.stat().st_size > MOST_BYTES:
            return Rejected(f"image file of more than {MOST_BYTES >> 20} MB")
        return path.read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL in its name
        return Rejected("image file cannot be read")


def fetched(url: str) -> bytes | Rejected:
    def content() -> bytes:
        parts, size, end = [], 0, time.monotonic() + FETCH_SECONDS
        with opened(url, FETCH_STALL) as stream:
            while part := stream.read(CHUNK):
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES or time.monotonic() > end:
                    raise DataError(f"{url} is too large or too slow")
        return b"".join(parts)

    try:
        return retried(content, FETCH_TRIES, url)
    except DataError:
        return Rejected("image cannot be fetched")


def texts_of(value: Any) -> list[str]:
    """The captions that a cell holds: one text or a list of them; nothing where it is no text."""
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []


def id_of(value: Any) -> int | str | None:
    """An image's id as a cell gives it, digits as a number (as pandas writes one: 42.0); None where there is none."""
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    if isinstance(value, str) and re.fullmatch("-?(0|[1-9][0-9]{0,18})", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return value if isinstance(value, str) or -(1 << 63) <= value < 1 << 63 else str(value)


def content_id(data: bytes) -> int:
    """The id of a picture that came without one: the same bytes are the same picture."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
