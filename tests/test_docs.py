"""Every block that a reader sees has run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(*command: str, limit: float) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_an_example_each_way() -> None:
    assert sum("@as_jax" in block for block in BLOCKS) == 1
    assert sum("@as_torch" in block for block in BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme(block: str) -> None:
    assert max(map(len, block.splitlines())) <= 120
    run(sys.executable, "-c", block, limit=120)


def test_quickstart() -> None:
    out = run(sys.executable, "examples/quickstart.py", limit=240)
    assert re.search(r"\(a\) .*accuracy (9[5-9]\.\d|100\.0)%", out)
    assert re.search(r"\(b\) .*accuracy (9[5-9]\.\d|100\.0)%", out)
    assert "(c) Hessian-vector product" in out


def test_the_readme_names_nothing_that_is_not_public() -> None:
    import interop

    named = set(re.findall(r"from interop import ([\w, ]+)", (ROOT / "README.md").read_text()))
    assert {name.strip() for line in named for name in line.split(",")} <= set(interop.__all__)
