"""What every test stands on: seeds, one thread, a fresh compiler, and the two hosts under one set of names."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator

import jax
import pytest
import torch

from hosts import DEVICE
from programs import run_program

torch.set_num_threads(1)
# Thousands of programs that run once: what compiles them is half the time. What runs in a process of its own is
# compiled as a user's is.
jax.config.update("jax_disable_most_optimizations", True)
if DEVICE == "cpu" and torch.cuda.is_available():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else what the tests make in JAX would be on the GPU


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves no compiled code behind."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a program in a fresh interpreter under a time limit; what it prints. Fails on a crash, a hang or an exception."""

    def run(program: str, *, timeout: float = 60, **environment: str) -> str:
        return run_program("-c", textwrap.dedent(program), timeout=timeout, **{"OMP_NUM_THREADS": "1"} | environment)

    return run
