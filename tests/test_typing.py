"""Static types: the cases are true when they run, the overloads are those of the table, a wrong call is an error.

That the cases type as they say, and that the wrong calls are refused, pyright and mypy say in `make lint`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
import types
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
import typing_extensions

import interop

ROOT = Path(__file__).parent.parent
CASES = [ROOT / "tests/typing/crossed_into_torch.py", ROOT / "tests/typing/crossed_into_jax.py"]
WRONG = ROOT / "tests/typing/wrong_calls.py"


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value is what a checker takes it for."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if kind is None:
        return value is None
    if origin in (types.UnionType, typing.Union):
        return any(has_type(value, a) for a in arguments)
    if origin is None:
        return isinstance(value, kind)
    if not isinstance(value, origin):
        return False
    if origin is tuple and arguments[-1] is not ...:
        return len(value) == len(arguments) and all(map(has_type, value, arguments))
    if origin in (tuple, list):
        return all(has_type(v, arguments[0]) for v in value)
    if origin is dict:
        return all(has_type(k, arguments[0]) and has_type(v, arguments[1]) for k, v in value.items())
    if is_dataclass(origin):
        return all(has_type(v, arguments[0]) for v in vars(value).values())
    return all(has_type(v, arguments[0]) for v in (value if isinstance(value, tuple) else ()))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1, str), ((1,), tuple[int, int]), ([1, "a"], list[int]), ({"a": 1}, dict[str, str]), (None, int | str)],
    ids=str,
)
def test_the_check_of_a_value_is_not_blind(value: Any, kind: Any) -> None:
    assert not has_type(value, kind)


@pytest.mark.parametrize("file", CASES, ids=lambda f: f.stem)
def test_every_value_has_the_type_that_a_checker_gives_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = set()

    def assert_type(value: Any, kind: Any) -> None:
        line = inspect.stack()[1].lineno
        lines.add(line)
        assert has_type(value, kind), f"{file.name}:{line}: {value!r} is no {kind}"

    monkeypatch.setattr(typing_extensions, "assert_type", assert_type)
    runpy.run_path(str(file))
    assert len(lines) == _count(file)


def _count(file: Path) -> int:
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "assert_type"
        for node in ast.walk(ast.parse(file.read_text()))
    )


def test_there_are_cases_enough_and_each_is_checked_by_both() -> None:
    assert sum(map(_count, CASES)) >= 80
    marks = [line for line in WRONG.read_text().splitlines() if "# type: ignore[" in line]
    assert len(marks) >= 15
    assert all("# pyright: ignore[" in line for line in marks)


def test_the_overloads_are_those_of_the_table() -> None:
    written = runpy.run_path(str(ROOT / "tests/typing/overloads.py"))["written"]()
    assert len(written) == 2
    for path, text in written.items():
        assert path.read_text() == text, f"python tests/typing/overloads.py --write  # {path.name} differs"


# --- what a reader is shown -------------------------------------------------------------------------------------------

SECTION = (ROOT / "README.md").read_text().split("## What an editor shows\n")[1].split("\n## ")[0]
SHOWN = dict(
    re.split(r"  +", line.strip(), maxsplit=1) for line in re.findall(r"^    \S.*  +.*$", SECTION, re.MULTILINE)
)
IMPORTS = """
from dataclasses import dataclass
from typing import Generic, TypeVar
import torch
from jax import Array
from torch import Tensor
from interop import as_torch
"""


def example(kind: type) -> str:
    """The program in a docstring."""
    block = re.search(r"^    @?A = .*?(?=^\S)", inspect.getdoc(kind) or "", re.MULTILINE | re.DOTALL)
    assert block
    return IMPORTS + textwrap.dedent(block[0])


def test_a_structure_that_says_its_twin_crosses() -> None:
    names: dict[str, Any] = {}
    exec(example(interop.SupportsTorch), names)
    x = torch.ones(2)
    stepped = names["step"](names["State"](x, x))
    assert isinstance(stepped, names["State"])
    assert torch.equal(stepped.x, x + x)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What pyright says of the two programs, with the questions below them."""
    readme = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[0]
    names = [f"reveal_type({text})" if text.isidentifier() else text for text in SHOWN]
    twin = example(interop.SupportsTorch) + "reveal_type(step(State(torch.ones(1), torch.ones(1))))"
    with tempfile.TemporaryDirectory() as folder:
        for name, program in {"readme": "\n".join([readme, *names]), "twin": twin}.items():
            Path(folder, f"{name}.py").write_text(program)
        command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    return [found["message"] for found in json.loads(done.stdout)["generalDiagnostics"]]


@pytest.mark.parametrize("text", SHOWN)
def test_an_editor_shows_what_the_readme_says(said: list[str], text: str) -> None:
    shown = f'Type of "{text}" is "{SHOWN[text]}"' if text.isidentifier() else SHOWN[text]
    assert len([message for message in said if message == shown or message.strip().endswith(shown)]) == 1


def test_a_checker_knows_the_twin_of_the_docstring_and_nothing_else_is_wrong(said: list[str]) -> None:
    assert len(SHOWN) == 3
    assert len(said) == len(SHOWN) + 1, said
    assert any(message.endswith('is "State[Tensor]"') for message in said)


def test_a_number_that_a_function_gives_back_is_traced_whatever_its_annotation() -> None:
    """As of `jax.jit`: the type of the result says `int`, and the value is a tensor, unless the argument is static."""

    def given(x: jax.Array, n: int) -> tuple[jax.Array, int]:
        return x, n

    assert isinstance(interop.as_torch(given)(torch.ones(1), 2)[1], torch.Tensor)
    assert interop.as_torch(given, static_argnames="n")(torch.ones(1), 2)[1] == 2
