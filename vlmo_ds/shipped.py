"""Recipes, DeepSpeed configs and recorded curves that come with the project, found by name from anywhere."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CLONE = {
    "recipes": PACKAGE.parent / "launch" / "recipes",
    "ds_configs": PACKAGE.parent / "ds_configs",
    "references": PACKAGE.parent / "launch" / "references",
}
SUFFIX = {"recipes": ".yaml", "ds_configs": ".json", "references": ".json"}
PREFIXES = {
    "recipes": "launch/recipes/",
    "ds_configs": "ds_configs/",
    "references": "launch/references/",
}  # as in a clone, where the documentation names them


def folder(kind: str) -> Path:
    """Where the recipes or ds_configs are: inside an installed package, beside it in a clone."""
    return PACKAGE / kind if (PACKAGE / kind).is_dir() else CLONE[kind]


def names(kind: str) -> list[str]:
    """The names that `find` knows, such as quickstart, finetune/vqa_base_480, zero2."""
    root = folder(kind)
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob(f"*{SUFFIX[kind]}"))


def find(kind: str, name: str | Path) -> Path:
    """The file of that path, else the one of that name that comes with the project; the path where there is neither."""
    path = Path(name)
    short = str(path).removeprefix(PREFIXES[kind]).removesuffix(SUFFIX[kind])
    if not path.exists() and short in names(kind):
        return folder(kind) / f"{short}{SUFFIX[kind]}"
    return path
