"""The scripts of the README's table: each runs by itself, checks its own result, and draws its picture."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from programs import ROOT, run_program

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SHORT = [name for name in SCRIPTS if name != "quickstart"]  # which test_docs runs
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"sklearn": "scikit-learn"}  # whose name is not that of the module


def parsed(name: str) -> ast.Module:
    return ast.parse((EXAMPLES / f"{name}.py").read_text())


def libraries(name: str) -> set[str]:
    """What a script imports, but for Python's own and ours."""
    imports = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"interop"}


@pytest.mark.parametrize("name", SHORT)
def test_an_example_holds_what_it_promises(name: str, tmp_path: Path, run_python: Callable[..., str]) -> None:
    """It runs from a copy, so that the picture that is shown stays as it is; it fails by itself."""
    missing = sorted(library for library in libraries(name) if importlib.util.find_spec(library) is None)
    if missing:
        pytest.skip(f"without {', '.join(missing)}")
    copy = shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    (tmp_path / "pictures").mkdir()
    program = f"import runpy; runpy.run_path({copy!r}, run_name='__main__')"
    assert run_python(program, timeout=240, MPLBACKEND="agg", HF_HUB_OFFLINE="1")
    assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short_says_what_it_shows_and_checks_it(name: str) -> None:
    program, lines = parsed(name), (EXAMPLES / f"{name}.py").read_text().splitlines()
    docstring = ast.get_docstring(program)
    assert docstring
    assert len([line for line in docstring.splitlines() if line]) in range(2, 5)
    assert len(lines) < 80
    assert "torch.set_num_threads(1)" in lines
    assert any(isinstance(node, ast.Assert) for node in ast.walk(program.body[-1]))


@pytest.mark.parametrize("script", sorted((EXAMPLES / "scaling_out").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_of_two_processes_or_devices(script: Path) -> None:
    """It is whole, short, shown on the page, and checks its own result."""
    text = script.read_text()
    assert len(text.splitlines()) < 40
    assert "assert" in text
    assert f'--8<-- "examples/scaling_out/{script.name}"' in (EXAMPLES / "scaling_out.md").read_text()
    assert run_program(script, timeout=120)


def test_every_picture_is_of_a_script_and_small() -> None:
    pictures = {path.stem: path.stat().st_size for path in (EXAMPLES / "pictures").iterdir()}
    assert sorted(pictures) == SHORT
    assert max(pictures.values()) < 60_000


def test_the_readme_has_a_line_for_every_script() -> None:
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\]\(examples/\1\.py\) \| [^|]+ \| [^|]+ \|$", readme, re.MULTILINE) == [
        "quickstart",
        *sorted(SHORT, key=readme.index),
    ]
    shown = re.findall(r"\]\((examples/[^)]*)\)", readme)
    assert [path for path in shown if not (ROOT / path).is_file()] == []
    assert {f"examples/pictures/{name}.png" for name in SHORT} <= set(shown)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_extra_brings_what_an_example_imports(name: str) -> None:
    brought = {re.split(r"\W", line.replace("-", "_"))[0] for line in PROJECT["dependencies"]}
    brought |= {line.replace("-", "_") for line in PROJECT["optional-dependencies"]["examples"]}
    assert {PACKAGES.get(library, library).replace("-", "_") for library in libraries(name)} <= brought
