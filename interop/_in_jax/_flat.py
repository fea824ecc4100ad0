"""A flat torch function, run on arrays: eagerly on the caller's thread, or as a callback of a compiled program."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import numpy as np
import torch

from interop._abstract import Aval, Outputs, check_promise, check_structure, infer_torch
from interop._derive import NOTHING, Axes, Flat, Mask, Static, derive_vmap
from interop._errors import AbstractEvalError, InteropError, PrecisionError, UnsupportedError
from interop._leaf import (
    NUMPY_OF,
    THREAD,
    WIDE_FLOATS,
    array_to_tensor,
    copy_tensor,
    describe,
    import_tensor,
    jax_dtype,
    narrow,
    resolve,
    view_of,
    x64_enabled,
)
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._side import Leaf, Leaves

_from_capsule, _capsule_of = torch_private.from_capsule, jax_private.capsule_of
_log = logging.getLogger("interop")
set_grad_enabled = torch_private.set_grad_enabled


@dataclass(eq=False)
class TorchFlat(Flat):
    """A flat torch function.

    Attributes:
        origin: of a function over a batch, the function of one example: they share the structure of their outputs.
        known: of a derived function, its outputs, which follow from those of the function it is derived from.
    """

    origin: TorchFlat | None = None
    known: Callable[[Sequence[Aval]], Outputs] | None = None

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals, in the dtypes that JAX keeps."""
        return self.memo(("outputs", avals, x64_enabled()), lambda: self._outputs(avals))

    def _outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        promised: Callable[[Sequence[Aval]], Outputs] | None = self.known or self.levels.example_output
        found = promised(avals) if promised else infer_torch(self, avals)
        kept: list[Aval] = []
        for index, aval in enumerate(found.avals):
            try:
                kept.append(Aval(aval.shape, _kept(aval)))
            except InteropError as error:
                raise in_result(error, found.structure, index)  # noqa: B904 - the same error, located
        return replace(found, avals=tuple(kept))

    def pure_outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """The same, for a trace; raises for a function that draws random numbers: a trace would merge them."""
        found = self.outputs(avals)
        if found.random:
            raise _random(self)
        return found

    def jvp(self, nonzero: Mask) -> Self:
        """The derivative along tangents, whose outputs look like the inexact ones of the function."""
        jvp = super().jvp(nonzero)
        jvp.known = lambda avals: _some(self.outputs(tuple(avals[: len(nonzero)])), is_inexact)
        return jvp

    def vjp(self, nonzero: Mask, present: Mask) -> Self:
        """The transpose, whose outputs look like the primals."""
        vjp = super().vjp(nonzero, present)
        vjp.known = lambda avals: replace(
            self.outputs(tuple(avals[: len(nonzero)])),
            avals=tuple(aval for aval, active in zip(avals, nonzero, strict=False) if active),
            structure=NOTHING,
        )
        return vjp

    def vmap(self, in_axes: Axes) -> Self:
        """The function over a batch: by `torch.func.vmap`, or by a loop where asked for, or torch has no rule."""
        return self.memo(("vmap", in_axes), lambda: self._vmapped(in_axes))

    def _vmapped(self, in_axes: Axes) -> Self:
        loop, by_rule = _loop(self, in_axes), derive_vmap(self, in_axes)

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            if self.levels.vmap == "sequential":
                return loop(*leaves)
            try:
                return by_rule(*leaves)
            except (
                RuntimeError
            ) as error:  # torch has no rule, or the function looks at values; else the loop raises too
                _log.debug("%s: batched by a loop (%s)", self.name, error)
                return loop(*leaves)

        batched = self.derived("vmap", fn)
        batched.origin = self.origin or self
        batched.known = lambda avals: _batched(self, avals, in_axes)
        return batched


def is_inexact(aval: Any) -> bool:
    """Whether a leaf of this aval has a derivative."""
    return bool(jax.dtypes.issubdtype(aval.dtype, np.inexact))


def _some(outputs: Outputs, chosen: Callable[[Aval], bool]) -> Outputs:
    return replace(outputs, avals=tuple(filter(chosen, outputs.avals)), structure=NOTHING)


def _batched(flat: TorchFlat, avals: Sequence[Aval], in_axes: Axes) -> Outputs:
    """The outputs over a batch, from those of one example."""
    pairs = list(zip(avals, in_axes, strict=True))
    size = next(aval.shape[axis] for aval, axis in pairs if axis is not None)
    example = [Aval(tuple(n for i, n in enumerate(aval.shape) if i != axis), aval.dtype) for aval, axis in pairs]
    outputs = flat.outputs(tuple(example))
    return replace(outputs, avals=tuple(Aval((size, *aval.shape), aval.dtype) for aval in outputs.avals))


def _kept(aval: Aval) -> np.dtype[Any]:
    """The dtype in which JAX keeps a result of this dtype."""
    dtype = {v: k for k, v in NUMPY_OF.items()}[aval.dtype]
    refuse_wide_float(dtype, aval)
    return jax_dtype(dtype, x64=x64_enabled())


def refuse_wide_float(dtype: torch.dtype, result: Any) -> None:
    """Raise `PrecisionError` for a 64-bit float that JAX would narrow."""
    if dtype in WIDE_FLOATS and not x64_enabled():
        raise PrecisionError(
            f"a {str(dtype).removeprefix('torch.')} result has nowhere to go",
            got=describe(result),
            hint="Return y.float(), or set jax.config.update('jax_enable_x64', True)",
        )


def _loop(flat: Flat, in_axes: Axes) -> Callable[..., tuple[Leaves, Static]]:
    """The function called on one example after the other."""

    def loop(*leaves: Leaf) -> tuple[Leaves, Static]:
        size = next(leaf.shape[axis] for leaf, axis in zip(leaves, in_axes, strict=True) if axis is not None)
        rows = []
        for i in range(size):
            example = [x if axis is None else x.select(axis, i) for x, axis in zip(leaves, in_axes, strict=True)]
            outs, structure = flat.fn(*example)
            rows.append((outs, structure))
        if not rows:
            raise AbstractEvalError("a loop over an empty batch has no outputs", hint="Use as_jax(vmap='auto')")
        return tuple(torch.stack(column) for column in zip(*(outs for outs, _ in rows), strict=True)), rows[0][1]

    return loop


# --- eager ------------------------------------------------------------------------------------------------------------


def run(flat: Flat, arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], Static]:
    """Run it on the values of arrays. It works on its own copy of them, and its results are copied out of it."""
    graph = torch.is_grad_enabled()
    set_grad_enabled(False)
    try:
        outs, structure = flat.fn(*own(arrays))
        if flat.levels.example_output is not None:
            promised = flat.levels.example_output(tuple(map(_aval, arrays)))
            check_promise(outs, promised.avals, flat.name)
            check_structure(structure, promised.structure, flat.name)
        return results_to_arrays(outs, structure), structure
    finally:
        set_grad_enabled(graph)


def own(arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
    """Tensors with the values of arrays, in memory that nobody else has: the function may write to it, and keep it."""
    try:
        return [_from_capsule(_capsule_of(a)).clone() for a in arrays]  # `export`, without its frame
    except (TypeError, ValueError, RuntimeError, BufferError):
        return [t.clone() for t in tensors_of(arrays)]  # a Python number, an array on several devices, or one to refuse


def tensors_of(arrays: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors over the memory of arrays, gathered if they are on several devices; raises for one that can't cross."""
    if any(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in arrays):
        warn_gathered()
    tensors: list[torch.Tensor] = []
    for index, array in enumerate(arrays):
        try:
            tensors.append(array_to_tensor(array))
        except InteropError as error:
            raise error.at(index)  # noqa: B904 - the same error, located
    return tensors


_warned = False


def warn_gathered() -> None:
    """Say once in a process that an array on several devices is not computed on where it is."""
    global _warned  # noqa: PLW0603 - once in a process
    if not _warned:
        _warned = True
        warnings.warn(
            "a torch function was given an array on several devices: it is gathered, and the function computes on the "
            "whole of it. Use jax.shard_map to compute on each shard",
            UserWarning,
            stacklevel=2,
        )


def results_to_arrays(outs: Sequence[torch.Tensor], structure: Static) -> list[jax.Array]:
    """The results as arrays of their own; raises for one that can't cross."""
    index = 0
    arrays: list[jax.Array] = []
    try:
        for index, out in enumerate(outs):  # noqa: B007 - for the message
            arrays.append(result_to_array(out))
    except InteropError as error:
        raise in_result(error, structure, index)  # noqa: B904 - the same error, located
    return arrays


def in_result(error: InteropError, structure: Static, index: int) -> InteropError:
    """The error, blaming this leaf of the result."""
    error.result = structure.value.path(index) if structure.value else None
    return error


def result_to_array(t: torch.Tensor) -> jax.Array:
    """A result as an array of its own: somebody may write to the tensor (a parameter, a cache, a view)."""
    view = view_of(t)
    if view is not None:
        return copy_tensor(view)
    x64 = x64_enabled()
    refuse_wide_float(t.dtype, t)
    t = resolve(t.detach())
    if t.dtype in (torch.int64, torch.uint64) and not x64:
        t = narrow(t)
    return import_tensor(t.clone(memory_format=torch.contiguous_format))


def _aval(array: Any) -> Aval:
    return Aval(tuple(array.shape), np.dtype(array.dtype))


# --- callback ---------------------------------------------------------------------------------------------------------

# A function of the user may be entered from several threads of a compiled program; torch modules are not made for that.
_lock = threading.RLock()


def callback(flat: Flat, avals: Sequence[Aval], structure: Static | None, *, trusted: bool) -> Callable[..., None]:
    """The body of a `buffer_callback`; a promised structure is checked.

    A trusted function is a graph of ours: it keeps and writes nothing.
    """
    state = TorchState.now()

    def body(_: Any, outs: Any, *buffers: Any) -> None:
        # Nobody above but JAX's wrapper of this: a thread of XLA's own, and not the one that called the program.
        THREAD.cannot_wait = sys._getframe(1).f_back is None
        with state, torch.no_grad():
            ins = [export_buffer(b) for b in buffers]
            if trusted:
                results = flat.leaves(*ins)
            else:
                with _lock:
                    results = _run_untrusted(flat, [t.clone() for t in ins], structure)
            _write(results, outs, avals, flat.name)

    return body


def _run_untrusted(flat: Flat, ins: list[torch.Tensor], promised: Static | None) -> Leaves:
    """Run a function of the user; one that could not be inferred is watched instead."""
    if promised is None:
        return flat.leaves(*ins)
    before = torch.get_rng_state()
    results, structure = flat.fn(*ins)
    check_structure(structure, promised, flat.name)
    if not torch.equal(before, torch.get_rng_state()):
        raise _random(flat)
    return results


def _random(flat: Flat) -> UnsupportedError:
    error = UnsupportedError(
        "it draws random numbers, which is not supported under a trace yet",
        hint="Draw them outside and pass them in, or call it eagerly",
    )
    error.function = flat.name
    return error


def export_buffer(buffer: Any) -> torch.Tensor:
    """A tensor over a buffer of a running program; valid until the callback returns."""
    return torch_private.from_capsule(buffer.__dlpack__())


def _write(results: Leaves, outs: Sequence[Any], avals: Sequence[Aval], name: str) -> None:
    """Copy the results into the program's buffers, checked first: `copy_` would broadcast and cast in silence."""
    wide = [narrow(r) if r.dtype in (torch.int64, torch.uint64) and a.dtype.itemsize == 4 else r
            for r, a in zip(results, avals, strict=False)]  # fmt: skip
    check_promise(wide if len(wide) == len(results) else results, avals, name)
    for result, out in zip(wide, outs, strict=True):
        export_buffer(out).copy_(result)


@dataclass(frozen=True)
class TorchState:
    """What torch functions depend on beside their arguments, as it was where the program was made.

    A callback runs on any thread, with that thread's modes, and with denormals flushed to zero.
    """

    autocast: bool
    autocast_dtype: torch.dtype
    default_dtype: torch.dtype
    default_device: torch.device

    @staticmethod
    def now() -> TorchState:
        """The state of this thread."""
        return TorchState(
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
        )

    def __enter__(self) -> None:
        _stacks.stack.append(self._entered())

    def __exit__(self, *_: object) -> None:
        _stacks.stack.pop().close()

    def _entered(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        if self != TorchState.now():
            stack.enter_context(torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast))
            stack.enter_context(_default_dtype(self.default_dtype))
            stack.enter_context(self.default_device)
        if _TINY * np.float32(1) == 0:
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        return stack


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.stack: list[contextlib.ExitStack] = []


_stacks = _Stacks()
_TINY = np.float32(1e-40)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
