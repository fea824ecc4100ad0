"""What a reader is shown has run: the README, its table of what works, the quickstart, the benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interop import UnsupportedError, as_jax
from test_transforms import GAPS
from test_transforms import __file__ as TRANSFORMS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = [
    pytest.param(found.group(1), README.read_text()[: found.start(1)].count("\n"), id=f"line{found.start(1)}")
    for found in re.finditer(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
]


def run_file(path: str, *arguments: str, timeout: float) -> str:
    """Run a program of the repository in a fresh interpreter; what it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / path), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the README -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "line"), BLOCKS)
def test_every_block_of_the_readme_prints_what_it_says(
    block: str, line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile("\n" * line + block, README, "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)


def test_the_readme_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?= {2,}#|`)", README.read_text())) <= targets


@pytest.mark.parametrize(
    "ask",
    [lambda: as_jax(abs, rng="key"), lambda: as_jax(abs, mutable=True)],
    ids=["rng", "mutable"],
)
def test_what_is_not_there_yet_says_so(ask) -> None:
    with pytest.raises(UnsupportedError, match="not there yet"):
        ask()


# --- the table of what works ------------------------------------------------------------------------------------------

# (what torch calls it, what JAX calls it, the transform in `test_transforms`)
SUPPORT = [
    ("call", "call", "call"),
    ("`torch.compile(fullgraph=True)`", "`jax.jit`", "compile"),
    ("`backward`", "`jax.grad`", "gradient"),
    ("`torch.func.grad`", "`jax.vjp`", "functional_gradient"),
    ("`backward` of a compiled function", "`jax.jit` of `jax.grad`", "compiled_gradient"),
    ("double backward", "`jax.grad` of `jax.grad`", "second"),
    ("`torch.func.jvp`", "`jax.jvp`", "jvp"),
    ("`torch.func.jacrev`", "`jax.jacrev`", "jacrev"),
    ("`torch.func.jacfwd`", "`jax.jacfwd`", "jacfwd"),
    ("`torch.func.hessian`", "`jax.hessian`", "hessian"),
    ("`torch.func.vmap`", "`jax.vmap`", "vmap"),
    ("`vmap` of `grad`", "`vmap` of `grad`", "vmap_of_gradient"),
    ("gradient of `vmap`", "`grad` of `vmap`", "gradient_of_vmap"),
    ("`torch.utils.checkpoint`", "`jax.checkpoint`", "checkpoint"),
    ("", "`jax.lax.scan`", "scan"),
    ("", "`jax.lax.cond`", "cond"),
]
BEGIN, END = "<!-- support table: written by tests/test_docs.py -->\n", "<!-- end of the support table -->"


def support_table() -> str:
    """The rows, with what the matrix of tests knows of each."""
    rows = [
        f"| {of_torch} | {works('torch', key) if of_torch else ''} | {of_jax} | {works('jax', key)} |"
        for of_torch, of_jax, key in SUPPORT
    ]
    return "\n".join(["| a JAX function in torch | | a torch function in JAX | |", "|---|---|---|---|", *rows, ""])


def works(host: str, transform: str) -> str:
    """What the gaps of the matrix leave."""
    missing = [case for of_host, of_transform, case in GAPS if (of_host, of_transform) == (host, transform)]
    if "*" in missing:
        return "not yet"
    return f"yes, but for {', '.join(sorted(missing))}" if missing else "yes"


def with_support_table(text: str) -> str:
    """The README with the table as it should be."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + support_table() + END + rest.split(END)[1]


def test_the_support_table_is_what_the_matrix_says() -> None:
    """`python tests/test_docs.py` writes it."""
    assert README.read_text() == with_support_table(README.read_text())


@pytest.mark.parametrize("transform", [key for *_, key in SUPPORT])
def test_every_row_of_the_support_table_is_a_test(transform: str) -> None:
    assert f'"{transform}"' in Path(TRANSFORMS).read_text()


# --- programs ---------------------------------------------------------------------------------------------------------


def test_the_quickstart_learns() -> None:
    """It fails by itself if it does not recognise 95 % of the digits, or if a derivative is off."""
    printed = run_file("examples/quickstart.py", timeout=240)
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", printed)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 95
    assert len(re.findall(r"gradients? within \d\.\de[-+]\d\d", printed)) == 3
    assert len(re.findall(r"Hessian-vector product within \d\.\de-\d\d", printed)) == 1
    assert len(re.findall(r"step \d+\.\d\d ms against \d+\.\d\d ms", printed)) == 2


def test_the_benchmarks_run() -> None:
    """One cell that asserts nothing about time."""
    assert "every target is met" in run_file("tests/benchmarks/bench.py", "retraces", timeout=120)


if __name__ == "__main__":
    README.write_text(with_support_table(README.read_text()))
