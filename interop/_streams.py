"""On a GPU: which stream waits for which.

Either framework queues its work on streams of its own, and uses memory again in the order of those, knowing nothing of
what the other has queued. So whoever reads waits for who has written, and whoever gets memory back for who has read.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Generator
from typing import Any

import jax
import torch
from jax.experimental.buffer_callback import buffer_callback

from interop._private import jax as jax_private


@functools.cache
def _of_programs(device: Any) -> torch.cuda.Stream:
    """The stream on which JAX runs programs on a device; only a program can tell."""
    found: list[int] = []

    def look(context: Any, _out: Any) -> None:
        found.append(context.stream)

    program = jax.jit(buffer_callback(look, jax.ShapeDtypeStruct((), bool)))
    with jax.ensure_compile_time_eval(), jax.default_device(device):
        jax.block_until_ready(program())
    return torch.cuda.ExternalStream(found[0], torch.device("cuda", device.local_hardware_id))


def read_by_torch(t: torch.Tensor, array: jax.Array) -> torch.Tensor:
    """A tensor over the memory of an array: torch's current stream waits for the array.

    When the tensor is dropped, JAX has the memory back, and waits for what torch has queued until then.
    """
    stream = torch.cuda.current_stream(t.device)
    jax_private.capsule_of(array, stream=stream.cuda_stream or 1)  # CUDA's own name for its default stream
    weakref.finalize(t.untyped_storage(), _give_back, array.device, t.device).atexit = False
    return t


def _give_back(device: Any, torch_device: torch.device) -> None:
    _of_programs(device).wait_stream(torch.cuda.current_stream(torch_device))


def read_by_jax(array: jax.Array, t: torch.Tensor) -> jax.Array:
    """An array over the memory of a tensor, which outlives the call; it waited for torch's stream when it was made.

    When it is dropped, torch has the memory back, and waits for what JAX has queued until then.
    """
    t.record_stream(_of_programs(array.device))
    return array


@contextlib.contextmanager
def on_stream(context: Any, device: torch.device) -> Generator[None]:
    """On the stream of a program on a GPU: XLA goes on when that stream has come so far.

    What the function closes over may be on its way in torch's own stream, or be written to there as soon as it returns.
    """
    program, home = torch.cuda.ExternalStream(context.stream, device=device), torch.cuda.default_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(program):
        program.wait_stream(home)
        try:
            yield
        finally:
            home.wait_stream(program)
