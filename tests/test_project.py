"""The project as a whole: packaging, start-up cost, and what must not be in its files."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import transform_ckpt

HEAVY = {"mindformers", "mindspore", "numpy", "torch", "transformers"}
PINS = {
    "mindformers": "1.9.0",
    "megatron-core": "0.16.1",
    "mindspore": "2.9.0",
    "numpy": "1.26.4",
    "safetensors": "0.7.0",
    "torch": "2.13.0",
    "transformers": "4.57.1",
}
MACHINE_PATH = re.compile(r"(?<![\w.\-])/" + "work/")
GENERATED = {".git", ".venv", "build", "dist", "bench-output", "demo-output"}


@cache
def setup_arguments(root: Path) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(root)
        runpy.run_path(str(root / "setup.py"))
    return given


def pinned(root: Path) -> dict[str, str]:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def requirements(root: Path) -> list[Requirement]:
    given = setup_arguments(root)
    return [Requirement(r) for group in (given["install_requires"], *given["extras_require"].values()) for r in group]


def project_files(root: Path) -> list[Path]:
    """Every file that belongs to the project: tracked, or new and not ignored; all files where git is not there."""
    if shutil.which("git") and (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [root / name for name in listed.split("\0") if name and (root / name).is_file()]
    return [path for path in root.rglob("*") if path.is_file() and not GENERATED & set(path.relative_to(root).parts)]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_version_is_the_same_everywhere(repo_root: Path) -> None:
    assert setup_arguments(repo_root)["version"] == transform_ckpt.__version__ == "0.1.0"


def test_extras(repo_root: Path) -> None:
    extras = setup_arguments(repo_root)["extras_require"]
    assert set(extras) >= {"mindspore", "mindformers", "torch", "megatron", "hf", "test", "dev", "all"}
    assert set(extras["all"]) == {requirement for name in set(extras) - {"all"} for requirement in extras[name]}


def test_base_install_needs_no_framework(repo_root: Path) -> None:
    base = {Requirement(r).name for r in setup_arguments(repo_root)["install_requires"]}
    assert base == {"click", "isal", "ml_dtypes", "numpy", "pyyaml", "rich", "xxhash"}


def test_requirements_are_ranges_that_the_pins_satisfy(repo_root: Path) -> None:
    pins = pinned(repo_root)
    for requirement in requirements(repo_root):
        assert not any(spec.operator == "==" for spec in requirement.specifier), requirement
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_pins_of_the_frameworks(repo_root: Path) -> None:
    assert pinned(repo_root).items() >= PINS.items()


def test_all_packages_are_found_and_typed(repo_root: Path) -> None:
    packages = set(setup_arguments(repo_root)["packages"])
    for name in ("transform_ckpt", "strategy"):
        inits = (repo_root / name).rglob("__init__.py")
        assert {".".join(path.parent.relative_to(repo_root).parts) for path in inits} <= packages
        assert all((path.parent / "__init__.py").is_file() for path in (repo_root / name).rglob("*.py"))
        assert (repo_root / name / "py.typed").is_file()


def test_console_script_exists(repo_root: Path) -> None:
    (script,) = setup_arguments(repo_root)["entry_points"]["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "transform-ckpt"
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("module", ["transform_ckpt", "strategy"])
def test_import_is_cheap(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert not HEAVY & set(loaded.split())


def test_help_is_cheap() -> None:
    code = (
        "import contextlib, io, runpy, sys\n"
        "sys.argv = ['transform-ckpt', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    runpy.run_module('transform_ckpt', run_name='__main__')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    assert not HEAVY & set(run_python(code).split())


def test_no_file_names_a_place_on_this_machine(repo_root: Path) -> None:
    found = []
    for path in project_files(repo_root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(repo_root)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if MACHINE_PATH.search(line)
        ]
    assert not found


def test_licence_is_apache_2(repo_root: Path) -> None:
    text = (repo_root / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert setup_arguments(repo_root)["license"] == "Apache-2.0"


def test_make_has_the_promised_targets(repo_root: Path) -> None:
    text = subprocess.run(["make", "help"], cwd=repo_root, capture_output=True, text=True, check=True).stdout  # noqa: S607
    targets = set(re.findall(r"^ *make (\w+)", text, re.MULTILINE))
    assert targets >= {"demo", "test", "bench", "lint", "venv", "clean", "help"}


def test_ci_runs_make_test(repo_root: Path) -> None:
    script = repo_root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
