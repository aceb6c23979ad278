"""Reads a recipe: YAML, `extends`, overrides; what is wrong with it is told in words.

A recipe's `model` names the family whose settings it is checked with. Nothing here imports PyTorch: a mistake is told in a
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlmo_ds import families, shipped
from vlmo_ds.config import EVALUATIONS, Recipe, RecipeError, Settings, nearest

QUICKSTART = "launch/recipes/quickstart.yaml"  # the recipe of commands that name none
# Settings that do not change what is trained: a run may go on with other values.
FREE_OF_STAGE = (
    ".checkpoint_every",
    ".log_images_every",
    ".workers",
    ".prefetch",
    ".max_bad_fraction",
    ".index",
    ".cache",
    ".cache_size_gb",
    ".tries",
    ".stall_seconds",
)
FREE = (
    *EVALUATIONS,
    "model.kernels",
    "model.compile",
    "keep_checkpoints",
    "checkpoint_copy",
    "checkpoint_failures",
    "background_checkpoints",
    "max_nonfinite_steps",
    "loss_spike",
    "check_ranks",
    "check_bits",
    "name",
)
LARGEST_YAML, MOST_YAML_VALUES, DEEPEST_YAML = 1 << 20, 50_000, 50  # bytes, values, levels


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` overrides, as in `stages.joint.steps=100` or `model.depth=4`.

    A stage that is set to null is left out.
    """
    data = read_recipe(Path(path))
    for override in overrides:
        apply_override(data, override)
    if isinstance(data.get("stages"), list):
        data["stages"] = [stage for stage in data["stages"] if stage is not None]
    return parse_recipe(data, str(path))


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's settings. One that `extends` another (a file beside it) has that one's, but for its name, and for what
    it lists under `settings`, dotted names and values."""
    path = shipped.find("recipes", path)
    if not path.is_file():
        known = shipped.names("recipes")
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(f"recipe {path} {what}{nearest(path.stem, known)}; in launch/recipes: {', '.join(known)}")
    try:
        data = read_yaml(path.read_bytes(), f"recipe {path}")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {path} holds {type(data).__name__}, expected settings such as 'model:' and 'stages:'"
        )
    if "extends" not in data:
        return data
    parent = path.parent / str(data.pop("extends"))
    if parent.resolve() in below:
        raise RecipeError(f"recipe {path} extends {parent}, which extends it in turn")
    settings, name = data.pop("settings", {}), data.pop("name", path.stem)
    if data or not isinstance(settings, dict):
        raise RecipeError(
            f"recipe {path} extends another: beside 'extends' it takes 'name' and 'settings' (dotted names and values), "
            f"found {', '.join(map(str, data)) or settings}"
        )
    whole = read_recipe(parent, (*below, path.resolve())) | {"name": name}
    for key, value in settings.items():
        set_value(whole, str(key), value, f"{path}: settings.{key}")
    return whole


def read_yaml(content: bytes, source: str) -> Any:
    """What a YAML file holds: plain values, lists and dictionaries. RecipeError, which begins with `source`, for what is no
    YAML, for keys that are given twice, and for what would take more time or memory than any recipe."""
    try:
        if len(content) > LARGEST_YAML:
            raise RecipeError(f"{source} has {len(content):,} bytes, at most {LARGEST_YAML:,} are read")
        text = content.decode()
        look_through(text, source)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source} is not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{source} is not valid YAML: {error}") from None


class OpenNode:
    """A list or dictionary that is being read: its anchor, the values in it, and a dictionary's keys so far."""

    def __init__(self, event: yaml.Event):
        self.anchor = getattr(event, "anchor", None)
        self.values, self.children = 1, 0
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None


def look_through(text: str, source: str) -> None:
    """Reads YAML event by event, which needs neither time nor memory for what aliases and brackets would unfold to."""
    sizes: dict[str | None, int] = {}  # anchor -> values that it stands for
    nodes: list[OpenNode] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        key, line = None, event.start_mark.line + 1  # type: ignore[union-attr]  # parsed events have one
        if isinstance(event, (yaml.DocumentStartEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            nodes.append(OpenNode(event))
            if len(nodes) > DEEPEST_YAML:
                raise RecipeError(f"{source} has more than {DEEPEST_YAML} lists or settings inside one another")
            continue
        if isinstance(event, yaml.ScalarEvent):
            anchor, size, key = event.anchor, 1, event.value
        elif isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in nodes):
                raise RecipeError(f"{source}: line {line}: '*{event.anchor}' is inside of what it stands for")
            anchor, size = None, sizes.get(event.anchor, 1)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            ended = nodes.pop()
            anchor, size = ended.anchor, ended.values
        else:
            continue
        if anchor:
            sizes[anchor] = size
        outer = nodes[-1]
        outer.values += size
        if outer.values > MOST_YAML_VALUES:
            raise RecipeError(f"{source} stands for more than {MOST_YAML_VALUES:,} values")
        if outer.keys is not None and outer.children % 2 == 0 and key is not None and key != "<<":
            if key in outer.keys:
                raise RecipeError(f"{source} has the setting '{key}' twice (line {line})")
            outer.keys.add(key)
        outer.children += 1


def parse_recipe(data: dict, source: str) -> Recipe:
    try:
        family = families.of_model(data.get("model"))
    except RecipeError as error:
        raise RecipeError(f"recipe {source}:\n  {error}") from None
    try:
        return family.recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"recipe {source}:"] + [f"  {explain(item, data, family.recipe)}" for item in error.errors()]
        raise RecipeError("\n".join(lines).encode("utf-8", "backslashreplace").decode()) from None
    except UnicodeEncodeError as error:
        raise RecipeError(f"recipe {source} holds half a surrogate pair, which is no character: {error}") from None


def apply_override(data: dict, override: str) -> None:
    """Sets one value in nested settings; a part of the key may be a stage's name, its number, or * for every stage."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not of the form key=value, such as stages.joint.steps=100")
    value = read_yaml(text.encode(), f"override '{override}': the value")
    set_value(data, key, value, f"override '{override}'")


def set_value(data: dict, key: str, value: Any, source: str) -> None:
    targets: list[Any] = [data]
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        targets = [found for target in targets for found in descend(target, part, source, ".".join(parts[:depth]))]
    for target in targets:
        if isinstance(target, list):
            replaced = descend(target, parts[-1], source, ".".join(parts[:-1]))
            target[:] = [value if any(old is entry for old in replaced) else entry for entry in target]
        elif isinstance(target, dict):
            target[parts[-1]] = value
        else:
            raise RecipeError(f"{source}: '{'.'.join(parts[:-1])}' has no settings in it")


def descend(target: Any, part: str, source: str, parent: str) -> list[Any]:
    if isinstance(target, list):
        if part == "*":
            return target
        named = [x for i, x in enumerate(target) if str(i) == part or (isinstance(x, dict) and x.get("name") == part)]
        if not named:
            names = ", ".join(str(x.get("name", i)) if isinstance(x, dict) else str(i) for i, x in enumerate(target))
            raise RecipeError(f"{source}: {parent} has no '{part}'; accepted: {names} or *")
        return named
    if not isinstance(target, dict):
        raise RecipeError(f"{source}: '{parent}' has no settings in it")
    if target.get(part) is None:
        target[part] = {}
    return [target[part]]


def explain(item: ErrorDetails, data: dict, recipe: type[Recipe]) -> str:
    """One validation error as a sentence: where, what was found, what is accepted."""
    location = [part for part in item["loc"]]
    where = []
    node: Any = data
    for part in location:
        name = part
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
            name = node.get("name", part) if isinstance(node, dict) else part
        elif isinstance(node, dict):
            node = node.get(part)
        where.append(str(name))
    place = ".".join(where) or "recipe"
    if item["type"] == "extra_forbidden":
        known = known_settings(recipe, location[:-1])
        return f"{place}: unknown setting{nearest(location[-1], known)}; accepted: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{place}: missing, and it has no default"
    found = item["input"]
    shown = "" if isinstance(found, dict) else f" (found {found!r})"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{shown}"


def known_settings(recipe: type[Recipe], location: Sequence[Any]) -> list[str]:
    model: Any = recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else model
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and get_origin(inner) is None and issubclass(inner, Settings):
                model = inner
    return sorted(model.model_fields)


# ---- two recipes beside each other ----


def changed_settings(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value before, value now) of what differs and changes what is trained, but for the shards' paths. None: not there."""
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_free(key, new.get(key))
    }


def is_free(key: str, now: Any) -> bool:
    parts = key.split(".")
    if key.startswith(FREE) or key.endswith(FREE_OF_STAGE) or "shards" in parts[2:]:
        return True
    if parts[0] == "stages" and parts[2:3] and parts[2] in ("ema", "evaluate", "evaluate_every"):
        return True
    return key in ("model.vocab_size", "model.mask_word", "model.vqav2_label_size") and now in (0, None)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names as a user writes them, stages.joint.steps, -> values."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(inner.get("name", i) if isinstance(inner, dict) else i, inner) for i, inner in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
