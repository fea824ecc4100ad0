"""The body of a callback: a flat torch function run from a compiled program, on any thread, as if it were at home."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from interop._abstract import Aval, check_promise, check_structure, narrowed
from interop._derive import FlatFn, Static
from interop._errors import InteropError
from interop._in_jax._flat import TorchFlat
from interop._in_jax._random import Watched, refused
from interop._in_jax._surroundings import TorchState, flushes
from interop._leaf import PLAIN, SMALL, refuse_foreign
from interop._notes import in_words, note_of
from interop._private import torch as torch_private
from interop._side import Leaf, Leaves
from interop._streams import on_stream
from interop._threads import TAKING_TURNS, THREAD, inside_a_gpu_program

from_numpy, from_capsule = torch.from_numpy, torch_private.from_capsule
set_flush_denormal = torch.set_flush_denormal
_below_autograd: Any = torch_private.below_autograd or torch.no_grad


def callback(flat: TorchFlat, avals: Sequence[Aval], structure: Static, *, trusted: bool) -> Callable[..., None]:
    """The body of a `buffer_callback`; results come in this structure.

    A trusted function is a graph of ours: it keeps and writes nothing.
    """
    state = flat.traced.state if flat.traced else TorchState.now()
    if flat.graph and flat.graph.plain and not state.is_autocast:
        run = _of_graph(flat, flat.graph.run, avals)
    elif trusted:
        run = _of_derived(flat, avals)
    else:
        run = _of_function(flat, avals, structure)
    is_here = state.watch()

    def on_device(context: Any, outs: Any, buffers: Sequence[Any]) -> None:
        places = [export_buffer(out) for out in outs]
        first = places[0] if places or not buffers else export_buffer(buffers[0])
        if first.is_cuda:
            with on_stream(context, first.device), inside_a_gpu_program():
                run(places, buffers)
        else:
            run(places, buffers)

    def body(context: Any, outs: Any, *buffers: Any) -> None:
        flushing, at_home = flushes(), is_here()
        found = state if at_home else TorchState.now()
        # Nobody above but JAX's wrapper of this: a thread of XLA's own, and not the one that called the program.
        alone = sys._getframe(1).f_back is None and not THREAD.cannot_wait
        if alone:
            THREAD.cannot_wait = True
        if flushing:
            set_flush_denormal(False)
        try:
            if at_home:
                on_device(context, outs, buffers)
            else:
                with state.entered():
                    on_device(context, outs, buffers)
        except BaseException as error:  # noqa: BLE001 - XLA passes on words alone, and dies of an error that has none
            raise RuntimeError(_said(error, flat)) from None
        finally:
            if alone:
                THREAD.cannot_wait = False
            if not (is_here() if at_home else found == TorchState.now()):
                found.put_back()  # the function has left a mode on
            if flushing:
                set_flush_denormal(True)

    return body


def _of_graph(flat: TorchFlat, graph: Callable[..., Leaves], avals: Sequence[Aval]) -> Callable[..., None]:
    """Run what is made of torch's own operations: no mode is looked at, and the results always have the same shapes."""
    fits = False

    def run(outs: list[torch.Tensor], buffers: Sequence[Any]) -> None:
        nonlocal fits
        with _below_autograd():
            results = graph(*[export_buffer(buffer) for buffer in buffers])
            if fits:
                for result, out in zip(results, outs, strict=True):
                    out.copy_(result)
            else:
                _write(results, outs, avals, flat)
                fits = all(result.dtype is out.dtype for result, out in zip(results, outs, strict=True))

    return run


def _of_derived(flat: TorchFlat, avals: Sequence[Aval]) -> Callable[..., None]:
    """Run what is derived from a graph."""

    def run(outs: list[torch.Tensor], buffers: Sequence[Any]) -> None:
        _write(flat.leaves(*map(export_buffer, buffers)), outs, avals, flat)

    return run


def _of_function(flat: TorchFlat, avals: Sequence[Aval], structure: Static) -> Callable[..., None]:
    """Run a function of the user's: on copies, one at a time, and look at what comes."""
    fn = _under_modes(flat)
    if flat.levels.example_output is not None and flat.key is None:
        fn = _without_draws(fn, flat.name)
    known = structure.value

    def run(outs: list[torch.Tensor], buffers: Sequence[Any]) -> None:
        nonlocal known
        with TAKING_TURNS:
            results, found = fn(*_own(buffers))
        if found.value is not known:
            check_structure(found, structure, flat.name, inferred=flat.levels.example_output is None)
            known = found.value  # the same object comes again
        _write(results, outs, avals, flat)

    return run


def _under_modes(flat: TorchFlat) -> FlatFn:
    """The function with its modules in the modes that they were traced in."""
    modes, traced, fn = flat.modes, flat.traced, flat.fn
    if modes is None or traced is None or isinstance(modes.under(traced.modes), contextlib.nullcontext):
        return fn

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        with modes.under(traced.modes):
            return fn(*leaves)

    return run


def _without_draws(fn: FlatFn, name: str) -> FlatFn:
    """A function that could not be inferred, watched: the program does not know that it draws."""

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        generators = Watched()
        found = fn(*leaves)
        if generators.were_drawn_from():
            raise refused(name, "what it draws is no effect that the program knows of: its shapes are not inferred")
        return found

    return run


def _own(buffers: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors with the values of buffers, in memory that nobody else has."""
    try:
        return [
            from_numpy(view.copy()) if (view := buffer.__array__()).nbytes < SMALL else export_buffer(buffer).clone()
            for buffer in buffers
        ]
    except Exception:  # noqa: BLE001 - numpy's dtypes are fewer, and all on the CPU
        return [export_buffer(buffer).clone() for buffer in buffers]


def _said(error: BaseException, flat: TorchFlat) -> str:
    """An error in words: the crossing, the type, the message, and the line of the user's that raised it."""
    if isinstance(error, InteropError):
        return f"{type(error).__name__}: {flat.locate(error)}"
    name = flat.name.partition(".")[0]
    note = note_of(error, "JAX", name)
    words = str(error) if isinstance(error, torch_private.Unmet) else in_words(error)
    return f"{name}: {words}" + (f"\n{note}" if note else "")


def export_buffer(buffer: Any) -> torch.Tensor:
    """A tensor over a buffer of a running program; valid until the callback returns."""
    return from_capsule(buffer.__dlpack__())


def _write(results: Leaves, places: Sequence[torch.Tensor], avals: Sequence[Aval], flat: TorchFlat) -> None:
    """Copy the results into the program's buffers, checked first: `copy_` would broadcast and cast in silence."""
    for result, place in zip(results, places, strict=False):
        if result.shape != place.shape or result.dtype is not place.dtype or type(result) not in PLAIN:
            break
        place.copy_(result)
    else:
        if len(results) == len(places):
            return
    for result in results:
        refuse_foreign(result)
    results = narrowed(results, avals)
    check_promise(results, avals, flat.name, inferred=flat.levels.example_output is None)
    for result, place in zip(results, places, strict=True):
        place.copy_(result)
