"""Which thread may wait for a program of JAX, and which of them runs torch for one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax

from interop._errors import ForkError, NestedError
from interop._private import jax as jax_private

_config: Any = jax.config
_forked = False

# A function of the user may be entered from several threads of a compiled program; torch modules are not made for that.
TAKING_TURNS: Any = threading.RLock()  # its underscored methods are those that `threading.Condition` calls
has_turn: Callable[[], bool] = TAKING_TURNS._is_owned


class _Thread(threading.local):
    """What a crossing has to know of its thread.

    Attributes:
        cannot_wait: whether a JAX program that this thread starts could wait for ever: the thread belongs to another
            compiled program, which has called back into torch and waits for this one; or to a forked child.
        on_gpu: whether that program runs on a GPU, which compiles no other meanwhile.
    """

    cannot_wait = False
    on_gpu = False


THREAD = _Thread()


def _after_fork() -> None:
    """JAX's threads do not survive a fork: starting a program in the child raises."""
    global _forked  # noqa: PLW0603 - the process itself is the state
    _forked = _forked or jax_private.backend_runs()
    if _forked:
        _Thread.cannot_wait = True


os.register_at_fork(after_in_child=_after_fork)


def refuse_forked() -> None:
    """Raise in a forked child of a process that runs JAX."""
    if _forked:
        raise ForkError(
            "this process was forked from one that runs JAX, whose threads did not survive",
            hint="Start it by spawn or forkserver: DataLoader(..., multiprocessing_context='spawn')",
        )


def refuse_waiting() -> None:
    """Raise where a JAX program would wait for ever, or could; programs that run in turn can't."""
    refuse_forked()
    if THREAD.on_gpu:
        raise NestedError(
            "a JAX function was called from torch inside a compiled JAX program on a GPU, which can hang",
            hint="Call it outside jit",
        )
    if not _config.read("jax_cpu_enable_async_dispatch"):
        return
    raise NestedError(
        "a JAX function was called from torch inside a compiled JAX program, which can hang",
        hint="Call jax.config.update('jax_cpu_enable_async_dispatch', False) before JAX starts, or call it outside jit",
    )


@contextlib.contextmanager
def turn_given_away() -> Generator[None]:
    """Others may take their turn: the program that is waited for may be among them."""
    held = TAKING_TURNS._release_save() if has_turn() else None
    try:
        yield
    finally:
        if held is not None:
            TAKING_TURNS._acquire_restore(held)


@contextlib.contextmanager
def inside_a_gpu_program() -> Generator[None]:
    """In a callback of a program on a GPU."""
    before = THREAD.cannot_wait, THREAD.on_gpu
    THREAD.cannot_wait = THREAD.on_gpu = True
    try:
        yield
    finally:
        THREAD.cannot_wait, THREAD.on_gpu = before
