"""Output avals from input avals, without the values; and the check of a result against what was promised."""

from __future__ import annotations

import collections
import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from interop._derive import Flat, Mask, Static
from interop._errors import AbstractEvalError, OutputMismatchError, UnsupportedError, named
from interop._leaf import NUMPY_OF, TORCH_OF, WIDE_INTS, describe, narrow, traced_device
from interop._notes import in_words
from interop._private import torch as torch_private
from interop._shapes import SHAPES
from interop._side import TORCH


class Aval(NamedTuple):
    """Shape and dtype of a leaf, in neither framework's type."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return describe(self)


class Check(NamedTuple):
    """An answer that a function has to get when it looks at values, and what it raises for the other."""

    answer: bool
    error: str


@dataclass(frozen=True)
class Outputs:
    """What is known of a flat function's outputs before it runs.

    Attributes:
        avals: of the leaves, in order.
        structure: what `flat.fn` returns beside the leaves.
        random: whether it draws from torch's generator.
        effects: whether it does more than compute: print, call back.
        checks: what it asks of values, in order, where it raises for any other answer.
        read: the constants whose values it asks.
    """

    avals: tuple[Aval, ...]
    structure: Static
    random: bool = False
    effects: bool = False
    checks: tuple[Check, ...] = ()
    read: tuple[torch_private.Read, ...] = ()


def aval_of(leaf: Any) -> Aval:
    """The aval of an array or a tensor, or of a typed number, which JAX's rules meet too."""
    dtype = leaf.dtype
    return Aval(tuple(np.shape(leaf)), NUMPY_OF[dtype] if isinstance(dtype, torch.dtype) else np.dtype(dtype))


def infer_jax(flat: Flat, avals: Sequence[Aval], *, x64: bool) -> Outputs:
    """The outputs of a JAX function, by tracing it."""
    with jax.enable_x64(x64):
        structs = (jax.ShapeDtypeStruct(*aval) for aval in avals)
        program, (outs, structure) = jax.make_jaxpr(flat.fn, return_shape=True)(*structs)
    found = tuple(Aval(out.shape, np.dtype(out.dtype)) for out in outs)
    return Outputs(found, structure, effects=bool(program.effects))


def infer_torch(flat: Flat, avals: Sequence[Aval]) -> Outputs:
    """The outputs of a torch function, by running it on fake tensors.

    Real tensors that the function closes over (weights, buffers) are allowed. Where it asks whether something is true
    of values (`if`, `assert`, the checks of `torch.distributions`), it is run once for either answer, and again for
    what it asks then: all that do not raise have to agree. What else can't run without values raises
    `AbstractEvalError`, naming `example_output`.
    """
    if any(not isinstance(size, int) for aval in avals for size in aval.shape):
        raise UnsupportedError(
            f"torch runs on shapes that are known: {_list(avals)}", hint="Trace it with numbers in the place of symbols"
        )
    found: dict[Answers, Outputs] = {}
    raised: dict[Answers, str] = {}
    waiting: list[Answers] = [()]
    while waiting:
        path = _Path(waiting.pop(), room=_MAX_PATHS - len(found) - len(raised) - len(waiting))
        try:
            with flat.put_back():
                outputs = path.follow(flat, avals)
        except Exception as error:
            if torch_private.needs_values(error):
                raise AbstractEvalError(
                    f"the output shapes can't be inferred ({named(error)})",
                    hint="Declare them: @jittable(example_output=...)",
                ) from error
            if not (found or waiting or path.others):  # it always raises
                raise
            raised[tuple(path.answers)] = in_words(error)
        else:
            found[tuple(path.answers)] = outputs
        waiting += path.others
    return _agreed(found, raised)


Answers: TypeAlias = "tuple[bool, ...]"
_MAX_PATHS = 64


class _Path:
    """One way through a function that asks for values: by these answers, and by True to what it asks after them."""

    def __init__(self, answers: Answers, *, room: int) -> None:
        self.given = answers
        self.room = room
        self.answers: list[bool] = []
        self.others: list[Answers] = []  # that are left to be followed

    def follow(self, flat: Flat, avals: Sequence[Aval]) -> Outputs:
        """The outputs on this way."""
        mode = torch_private.fake_mode()
        watch = torch_private.TraceWatch(self.decide, SHAPES, fakes=mode)
        found = None
        try:
            found = _run(flat, avals, mode, watch)
        except Exception:
            if not watch.needs_fakes:
                raise
        if found is None or watch.needs_fakes:  # the function may have caught that
            self.answers.clear()
            self.others.clear()
            watch = torch_private.TraceWatch(self.decide, SHAPES)
            found = _run(flat, avals, mode, watch)
        return replace(found, random=watch.draws, read=tuple(watch.constants.read.values()))

    def decide(self, condition: Callable[[], torch.Tensor], known: bool | None) -> bool | None:
        """The next answer; None where there were too many."""
        del condition
        if known is not None:
            return known
        index = len(self.answers)
        if index >= len(self.given):
            if len(self.others) >= self.room:
                return None
            self.others.append((*self.answers, False))
        self.answers.append(index >= len(self.given) or self.given[index])
        return self.answers[-1]


def _run(flat: Flat, avals: Sequence[Aval], mode: Any, watch: torch_private.TraceWatch) -> Outputs:
    """The outputs for fake tensors, in their mode or beside it."""
    with mode:
        fakes = [torch.empty(aval.shape, dtype=TORCH_OF[aval.dtype], device=traced_device()) for aval in avals]
    # In anomaly mode a derivative would look at values.
    with contextlib.nullcontext() if watch.fakes else mode, watch, torch.autograd.set_detect_anomaly(mode=False):
        outs, structure = flat.fn(*fakes)
        return Outputs(tuple(Aval(tuple(out.shape), NUMPY_OF[out.dtype]) for out in outs), structure)


def infer_followed(flat: Flat, avals: Sequence[Aval], active: Mask) -> Mask:
    """Which inexact outputs autograd would follow, if all gradients inside of a torch function were taken with graphs.

    What it follows are the active inputs. None where that can't be told without values.
    """
    watch = torch_private.TraceWatch(lambda _, known: known is not False, SHAPES)
    with flat.put_back(), torch_private.fake_mode(), watch, torch.enable_grad(), _GradientsWithGraphs():
        fakes = [torch.empty(aval.shape, dtype=TORCH_OF[aval.dtype], device=traced_device()) for aval in avals]
        try:
            outs, _ = flat.fn(*[x.requires_grad_(a).clone() for x, a in zip(fakes, active, strict=True)])
        except Exception:  # noqa: BLE001 - it has run on values: what is wrong without them is no error of this call
            return ()
    return tuple(out.requires_grad for out in outs if TORCH.is_inexact(out))


class _GradientsWithGraphs(TorchFunctionMode):
    """Below it, every gradient that is asked is taken with `create_graph=True`."""

    _TAKEN = frozenset({torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._TAKEN:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {}))
        given.arguments["create_graph"] = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            return func(*given.args, **given.kwargs)


def _agreed(found: dict[Answers, Outputs], raised: dict[Answers, str]) -> Outputs:
    """What all ways through a function agree on; of a single one, what it checks."""
    first, *others = found.values()
    first = replace(first, read=tuple(read for outputs in found.values() for read in outputs.read))
    for other in others:
        if (other.avals, other.structure) != (first.avals, first.structure):
            raise AbstractEvalError(
                "the result depends on values",
                got=f"{_list(first.avals)} or {_list(other.avals)}",
                hint="Return the same on every branch, or declare it: @jittable(example_output=...)",
            )
    if others:
        return replace(first, random=any(outputs.random for outputs in found.values()))
    (answers,) = found
    checks: list[Check] = []
    for index, answer in enumerate(answers):
        way = (*answers[:index], not answer)
        checks.append(Check(answer, next(error for path, error in raised.items() if path[: index + 1] == way)))
    return replace(first, checks=tuple(checks))


def kept_words(
    saved: Sequence[tuple[str, int]], residuals: Sequence[Any], path: Callable[[int], str] | None, structure: Static
) -> str:
    """What a backward keeps, in words: inputs and outputs by name, residuals by shape and dtype; the first of many."""
    words: list[str] = []
    for origin, i in saved:
        if origin == "residual":
            words.append(describe(residuals[i]))
        elif origin == "output":
            words.append(f"result{structure.value.path(i) if structure.value else f'[{i}]'}")
        else:
            try:
                words.append(path(i) if path else f"input {i}")
            except IndexError:  # a cotangent, of a derived function
                words.append(f"input {i}")
    counts = collections.Counter(words)
    every = [word if count == 1 else f"{count} of {word}" for word, count in counts.items()]
    more = [f"{len(every) - 8} more"] if len(every) > 8 else []
    return ", ".join([*every[:8], *more]) or "nothing"


def narrowed(results: Sequence[Any], promised: Sequence[Aval]) -> tuple[Any, ...]:
    """The results, with 64-bit integers of torch in 32 bits where those were promised; raises if one does not fit."""
    return tuple(
        narrow(r) if p is not None and r.dtype in WIDE_INTS and p.dtype.itemsize == 4 else r
        for r, p in itertools.zip_longest(results, promised[: len(results)])
    )


def check_promise(results: Sequence[Any], promised: Sequence[Aval], name: str, *, inferred: bool = False) -> None:
    """Raise `OutputMismatchError` unless every result has the shape and dtype that was promised or inferred for it."""
    got, expected = [aval_of(r) for r in results], list(promised)
    if got != expected:
        said, hint = _WHO_SAID[inferred]
        error = OutputMismatchError(
            f"the result disagrees with what was {said} for it", got=_list(got), expected=_list(expected), hint=hint
        )
        raise error.of(name)


def check_structure(got: Static, promised: Static, name: str, *, inferred: bool = False) -> None:
    """Raise `OutputMismatchError` unless the result is the pytree that was promised, or inferred."""
    if not promised.value.matches(got.value):
        said, hint = _WHO_SAID[inferred]
        raise OutputMismatchError(f"the result is another pytree than was {said} for it", hint=hint).of(name)


_WHO_SAID = {
    False: ("promised", "Correct example_output, or return what it says"),
    True: ("inferred", "Return the same at each call, or say what it returns: @jittable(example_output=...)"),
}


def _list(avals: Sequence[Aval]) -> str:
    return f"({', '.join(map(str, avals))})"
