"""Programs in interpreters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_program(*arguments: str | Path, timeout: float, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter prints, within a time limit, with the library of the repository unless another is named.

    Fails on a crash, a hang or an exception.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
