"""Prints a recipe as a run would take it, or what every setting is.

vlmo recipe [RECIPE] [key=value ...]    the recipe with every default filled in, as YAML
vlmo recipe --explain [NAME ...]        every setting (or those whose names begin so): type, default, meaning
vlmo recipe --list                      the recipes that come with the project
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlmo_ds import shipped
from vlmo_ds.config import Recipe, RecipeError, Settings
from vlmo_ds.families import DEFAULT, FAMILIES
from vlmo_ds.recipe_file import QUICKSTART, load_recipe

PLACES = {"stages": "stages.<name>", "sources": "sources.<name>"}  # how a list or table of settings is addressed


def inner_settings(annotation: Any) -> type[Settings] | None:
    """The settings class in an annotation such as `X`, `X | None`, `list[X]`, `dict[str, X]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and get_origin(part) is None and issubclass(part, Settings):
            return part
    return None


def type_name(annotation: Any) -> str:
    """An annotation in the words of a recipe: 'int', 'list of text', 'auto | sdpa', 'number or null'."""
    words = {int: "int", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in words:
        return words[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if parts and all(isinstance(part, str) for part in parts):  # Literal
        return " | ".join(parts)
    if origin is Annotated:
        return type_name(parts[0])
    if origin is list:
        return f"list of {type_name(parts[0])}"
    if origin is dict:
        return f"{type_name(parts[0])} -> {type_name(parts[1])}"
    if origin is tuple:
        return f"[{', '.join(map(type_name, parts))}]"
    if parts:
        return " or ".join(map(type_name, parts))
    return getattr(annotation, "__name__", str(annotation))


def default_of(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()


def every_setting(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of each setting; groups come with their class's description."""
    for name, field in model.model_fields.items():
        inner = inner_settings(field.annotation)
        if inner is None:
            yield prefix + name, type_name(field.annotation), default_of(field), field.description or ""
            continue
        place = prefix + PLACES.get(name, name)
        about = " ".join((inner.__doc__ or "").split())
        nothing = field.default is None
        yield place + ".*", "settings", "null" if nothing else "", f"{about} {field.description or ''}".strip()
        yield from every_setting(inner, place + ".")


def explanation(chosen: list[str], recipe: type[Recipe]) -> str:
    lines = []
    for name, kind, default, meaning in every_setting(recipe):
        if chosen and not any(name.startswith(c) for c in chosen):
            continue
        lines.append(f"{name}  ({kind}{f'; {default}' if default else ''})" if default else f"{name}  ({kind})")
        lines += textwrap.wrap(meaning, 110, initial_indent="    ", subsequent_indent="    ")
    if not lines:
        raise RecipeError(f"no setting begins with {' or '.join(chosen)}; `vlmo recipe --explain` lists all")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vlmo recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--explain", action="store_true", help="every setting: its type, default and meaning")
    parser.add_argument(
        "--family", choices=FAMILIES, default=DEFAULT.name, help="the models to explain for (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="the recipes that come with the project")
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe and settings to change")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.list:
            print("\n".join(shipped.names("recipes")))
        elif args.explain:
            print(explanation(args.words, FAMILIES[args.family].recipe))
        else:
            recipes = [word for word in args.words if "=" not in word]
            if len(recipes) > 1:
                raise RecipeError(f"two recipes given: {', '.join(recipes)}")
            recipe = load_recipe((recipes or [QUICKSTART])[0], [word for word in args.words if "=" in word])
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
