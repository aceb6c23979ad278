"""The wheel: recipes and configs are in it and are found by name from anywhere; one command leads to everything."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from vlmo_ds import __version__, shipped
from vlmo_ds.__main__ import COMMANDS


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves a build/ folder, whose old files would be in the next wheel
    for name in ("vlmo_ds", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def vlmo(installed, folder, *words, code=0):
    env = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "vlmo_ds", *words], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_recipes_and_configs_are_found_from_an_empty_folder(installed, tmp_path):
    assert (installed / "vlmo_ds/py.typed").exists()
    assert "name: quickstart" in vlmo(installed, tmp_path, "recipe", "quickstart")
    assert "name: vqa_base_480" in vlmo(installed, tmp_path, "recipe", "finetune/vqa_base_480")
    assert set(vlmo(installed, tmp_path, "recipe", "--list").split()) == set(shipped.names("recipes"))
    output = vlmo(installed, tmp_path, "train", "--deepspeed_config", "zero9", code=2)
    assert output.rstrip().endswith(f"in ds_configs: {', '.join(shipped.names('ds_configs'))}")
    assert {path.stem for path in (installed / "vlmo_ds/references").glob("*.json")} == set(shipped.names("references"))
    (tmp_path / "quickstart").write_text("name: mine")  # a file of the user's comes first
    assert "recipe quickstart" in vlmo(installed, tmp_path, "recipe", "quickstart", code=2)


def test_there_is_one_version(installed):
    """The wheel's, the one that reports show, and that of the citation."""
    (metadata,) = installed.glob("vlmo_ds-*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_console_command_is_in_the_wheel(installed):
    entries = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "vlmo = vlmo_ds.__main__:main" in entries


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_leads_somewhere(name):
    import importlib.util

    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


def test_a_command_that_does_not_exist(installed, tmp_path):
    assert "'evaluate retrievl' is no command (did you mean 'evaluate retrieval'?)" in vlmo(
        installed, tmp_path, "evaluate", "retrievl", code=2
    )
    assert "usage: vlmo NAME" in vlmo(installed, tmp_path, "--help")
