"""What every test stands on: seeds, one thread, a fresh compiler, and the two hosts under one set of names."""

from __future__ import annotations

import gc
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
if DEVICE == "cpu" and torch.cuda.is_available():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else what the tests make in JAX would be on the GPU


def _compile_in_a_hurry() -> None:
    """Thousands of programs run once each: what compiles them well takes longer than all else.

    A program in a process of its own is compiled as a user's is: the flags are gone once this process has read them.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.version.__version_info__ < (0, 11):  # later ones have no other emitters
        flags.append("--xla_cpu_use_fusion_emitters=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", " ".join(flags))
        jax.devices()


_compile_in_a_hurry()
gc.set_threshold(100_000, 30, 50)  # two frameworks are a million objects to look through: a tenth of all the time


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file stays in one process; a test whose program has its own goes wherever there is room.

    Those are the longest. They come last, and fill both processes to the end.
    """
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        if "run_python" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    """What the imports have made stays to the end: nobody looks through it again."""
    gc.freeze()


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
