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
from interop._private import torch as torch_private

_DEFAULT = 1  # CUDA's own address for its default stream, which torch calls 0


@functools.cache
def _of_programs(device: Any) -> torch.cuda.Stream:
    """The stream on which JAX runs programs on a device; only a program can tell."""
    found: list[int] = []

    def look(context: Any, _out: Any) -> None:
        found.append(context.stream)

    program = jax.jit(buffer_callback(look, jax.ShapeDtypeStruct((), bool)))
    with jax.ensure_compile_time_eval(), jax.default_device(device):
        jax.block_until_ready(program())
    return _stream(found[0], device.local_hardware_id)


@functools.lru_cache(maxsize=256)
def _stream(address: int, index: int) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(address, index) if address else torch.cuda.default_stream(index)


def _current(index: int) -> torch.cuda.Stream:
    return _stream(torch_private.current_stream(index), index)


def tensor_over(array: jax.Array, device: Any) -> torch.Tensor:
    """A tensor over the memory of an array on a GPU: torch's current stream waits until its values are there.

    When the tensor is dropped, JAX has the memory back, and waits for what torch has queued until then.
    """
    index: int = device.local_hardware_id
    stream = torch_private.current_stream(index) or _DEFAULT
    t = torch_private.from_capsule(jax_private.capsule_of(array, stream=stream))
    weakref.finalize(t.untyped_storage(), _give_back, _of_programs(device), index).atexit = False
    return t


def _give_back(programs: torch.cuda.Stream, index: int) -> None:
    programs.wait_stream(_current(index))


def array_over(t: torch.Tensor, device: Any) -> jax.Array:
    """An array over the memory of a tensor on a GPU, for the length of one call: JAX waits for torch's current stream.

    Torch waits for the results of the call, and so uses the memory again when JAX has read it.
    """
    ready, index = jax_private.ready_stream(device), device.local_hardware_id
    _stream(ready, index).wait_stream(_current(index))
    array: jax.Array = jax_private.import_capsule(torch_private.capsule_of(t), device, ready)
    return array


def outlive(t: torch.Tensor, device: Any) -> None:
    """Have torch wait, before it uses the memory of this tensor again, for what JAX has queued until then."""
    t.record_stream(_of_programs(device))


@contextlib.contextmanager
def on_stream(context: Any, device: torch.device) -> Generator[None]:
    """On the stream of a program on a GPU: XLA goes on when that stream has come so far.

    What the function closes over may be on its way in torch's own stream, or be written to there as soon as it returns.
    """
    program, home = _stream(context.stream, device.index), _stream(0, device.index)
    with torch.cuda.device(device), torch.cuda.stream(program):
        program.wait_stream(home)
        try:
            yield
        finally:
            home.wait_stream(program)
