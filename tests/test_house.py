"""The rooms of the house: which may import which, and that none outside a family's folder names it."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest
from conftest import ROOT

from vlmo_ds.families import FAMILIES

PACKAGE = ROOT / "vlmo_ds"
# A room may import from its own level and from those below.
LEVELS = [
    {"planning", "training"},
    {"evaluation", "interop"},
    {"generation"},
    {"families", "recipe_file"},
    {"objectives", "data", "blocks", "ledger", "manifest", "metrics", "weights_file"},
    {"distributed", "config", "progress", "shipped"},
]
COMMANDS = {"__main__", "quickstart", "recipe"}  # above all rooms
FORWARDING = {f"training/{name}.py" for name in ("plan", "preflight", "supervise")}  # older names of commands
# Where a word that is also a task's name means something else: an evaluation or a method of retrieval, by its name in a
# recipe and in a run's files, a dataset, or a field of a sample.
OTHER_MEANINGS = {
    "__main__.py": {"vqa", "nlvr2", "captioning", "classification"},
    "config.py": {"vqa"},
    **{
        f"data/{file}.py": {"caption"}
        for file in ("index", "inspect", "meta", "shards", "prepare/arrow", "prepare/folder")
    },
    "data/prepare/__main__.py": {"nlvr2", "caption"},
    "data/prepare/sources.py": {"nlvr2", "caption"},
    "evaluation/captioning.py": {"caption", "captioning"},
    "evaluation/capfilt.py": {"caption"},
    "evaluation/table.py": {"vqa", "nlvr2", "captioning", "classification"},
    "evaluation/classification.py": {"classification"},
    "evaluation/vqa.py": {"vqa"},
    "evaluation/nlvr2.py": {"nlvr2"},
    "evaluation/retrieval.py": {"itc"},
}
COMMAND = re.compile(r"\bvlmo (?=[a-z<{]|NAME)|\"vlmo\"")  # the console command
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
OBJECTIVES = {file for file in FILES if file.startswith("objectives/")}  # each names itself


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def level_of(room: str) -> int:
    return next((number for number, rooms in enumerate(LEVELS) if room in rooms), len(LEVELS))


def imported_rooms(file: str) -> Iterator[tuple[int, str]]:
    """(line, room) of what a file imports of this package, but for what only a type checker sees."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "vlmo_ds" else [module]
            yield from ((child.lineno, name.split(".")[1]) for name in names if name.startswith("vlmo_ds."))
            yield from walk(child)

    return walk(ast.parse((PACKAGE / file).read_text()))


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in COMMANDS and file not in FORWARDING])
def test_imports_point_one_way(file):
    room = room_of(file)
    upward = [
        f"{file}:{line} imports {found}" for line, found in imported_rooms(file) if level_of(found) < level_of(room)
    ]
    assert not upward


def tokens(file: str) -> Iterator[tuple[int, bool, str]]:
    """(line, whether it is a text, word) of identifiers and of texts that are no documentation."""
    source = (PACKAGE / file).read_text()
    documentation = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in documentation:
            yield token.start[0], token.type == tokenize.STRING, token.string


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_nothing_outside_its_folder_names_a_family_or_its_tasks(family):
    itself = re.compile(rf"(?i){family.name}(?!_ds)")
    task = re.compile(rf"""["'/.]({"|".join(family.tasks)})["'/.]""")  # as a text, or in a metric's or parameter's name
    found = []
    for file in FILES:
        if file.startswith(f"families/{family.name}/") or file == "families/__init__.py":
            continue
        another = file.startswith(
            tuple(f"families/{name}/" for name in FAMILIES)
        )  # whose tasks may have the same names
        for line, is_text, word in tokens(file):
            named = [word] if itself.search(COMMAND.sub("", word)) else []
            if is_text and file not in OBJECTIVES and not another:
                named += [name for name in task.findall(word) if name not in OTHER_MEANINGS.get(file, ())]
            found += [f"{file}:{line}: {name}" for name in named]
    assert not found


def test_tables_of_the_pages_are_what_their_files_say():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
