"""Sizes and CRC-32 checksums of the files in a folder of weights, so that damage is noticed before it is trained on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmo_ds.data.storage import write_atomically

MANIFEST = "manifest.json"


def crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as data:
        while block := data.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_manifest(folder: Path, checksums: Mapping[str, int]) -> None:
    """checksums: CRC-32 by name of each file in the folder."""
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": crc} for name, crc in checksums.items()}
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "crc32"}. ValueError with the reason for a manifest that cannot be used."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        entries = {name: {"bytes": int(entry["bytes"]), "crc32": int(entry["crc32"])} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({type(error).__name__})") from None
    if not entries:
        raise ValueError(f"its {MANIFEST} lists no file")
    if strange := [name for name in entries if Path(name).name != name]:
        raise ValueError(f"its {MANIFEST} lists {strange[0]!r}, which is no file name")
    return entries


def fault_of(folder: Path, share: tuple[int, int] | None = None) -> str:
    """What is wrong with a folder by its manifest; "" if it is whole. Files that it does not list do not count.

    Sizes are looked at always, contents where share = (i, n) is given: those of every n-th file from the i-th.
    """
    try:
        entries = list(listed(folder).items())
        for name, entry in entries:
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found is None:
                return f"{name} is missing"
            if found != entry["bytes"]:
                return f"{name} has {found} bytes, {entry['bytes']} were written"
        for name, entry in entries[share[0] :: share[1]] if share else ():
            if crc32(folder / name) != entry["crc32"]:
                return f"{name} does not hold what was written (its CRC-32 differs)"
    except (ValueError, OSError) as error:
        return str(error)
    return ""
