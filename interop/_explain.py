"""What a call of a crossing would do, without doing it: by the rules that a call itself goes by."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from interop import _in_jax, _in_torch
from interop._abstract import Aval, Outputs, aval_of, kept_words
from interop._call import Entry, located, needs_value
from interop._convert import by_name, by_position
from interop._crossing import entry_of
from interop._derive import NOTHING, Mask
from interop._errors import AbstractEvalError, InteropError, NotDifferentiableError, OptionError, named
from interop._given import crosses, in_64_bits
from interop._leaf import argument_of, describe, refuse_two_devices
from interop._marshal import Kind, Spec, StaticLeaf, Tree
from interop._module_in_torch import WrappedJaxFunction
from interop._side import TORCH, Leaf


class Row(NamedTuple):
    """A leaf of a call, or of its result.

    Attributes:
        path: where it is: `params['w'][0]`, `result[1]`.
        value: shape and dtype, `f32[2,3]`; of what is static, the value.
        how: "shared", "copied", "converted", "static", "traced" or "refused".
        why: for what reason; empty where there is nothing to say.
        gradient: whether a derivative is taken in it.
    """

    path: str
    value: str
    how: str
    why: str
    gradient: str

    @property
    def crosses(self) -> str:
        """How, and why."""
        return f"{self.how}: {self.why}" if self.why else self.how


@dataclass(frozen=True, repr=False)
class Explanation:
    """A report of one call, to be printed.

    Attributes:
        function: the name of the guest function.
        guest: the framework that it is written in.
        host: the framework that it is called from.
        levels: what was declared of it, of "differentiable" and "jittable".
        leaves: a row for each leaf of the arguments.
        outputs: a row for each leaf of the result; empty where it can't be inferred.
        gradient: where derivatives come from, and what is kept for them.
        retraces: what a later call differs in that is traced anew.
        notes: what else there is to know, and what was not declared.
        refused: the error that the call would raise; None if it would run.
    """

    function: str
    guest: str
    host: str
    levels: tuple[str, ...]
    leaves: tuple[Row, ...]
    outputs: tuple[Row, ...]
    gradient: str
    retraces: tuple[str, ...]
    notes: tuple[str, ...]
    refused: str | None

    def __str__(self) -> str:
        declared = ", ".join(self.levels) or "neither differentiable nor jittable"
        lines = [f"{self.function}: a {self.guest} function, called from {self.host}; {declared}"]
        rows = [(row.path, row.value, row.crosses, row.gradient) for row in (*self.leaves, *self.outputs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [f"gradient: {self.gradient}"]
        lines += [f"traced anew for: {'; '.join(self.retraces)}"] if self.retraces else []
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"refused: {self.refused}"] if self.refused else []
        return "\n  ".join(line.rstrip() for line in lines)

    __repr__ = __str__


def explain(fn: Any, /, *args: Any, **kwargs: Any) -> Explanation:
    """A report of the call `fn(*args, **kwargs)`, which is not made.

        print(interop.explain(loss, w, x))

    It says for each leaf of the arguments whether it would share its memory, be copied (and why), be converted or be
    static, and whether a derivative is taken in it; where derivatives come from and what is kept for them; for what a
    later call would be traced anew; and the outputs. What would be refused is in the report, in the words of the error.

    The function is never run on the values: it is traced, by JAX or on fake tensors of torch, as a compiler would do.
    Python code in it runs in that trace. A function whose outputs can't be inferred so is reported without them. Of the
    arguments, those whose conversion could be refused are converted.

    Args:
        fn: a crossing, in any form: a function, a method, a partial of one, `WrappedJaxFunction`, what
            `make_functional` returns.
        args: the arguments of the call.
        kwargs: its keywords.

    Returns:
        An `Explanation`: print it, or read its attributes (`leaves`, `outputs`, `gradient`, `retraces`, `notes`,
        `refused`).

    Raises:
        OptionError: `fn` is no crossing.
        TypeError: Python's own, for a call that does not fit the signature.
    """
    crossing, args, kwargs, names = _called(fn, args, dict(kwargs))
    entry, args = entry_of(crossing, args)
    if entry is None:
        error = OptionError("it is not crossed", expected="a crossing", hint="Stack @as_torch or @as_jax")
        raise error.of(getattr(fn, "__name__", type(fn).__name__))
    report = _Report(entry)
    try:
        key = [] if entry.rng is None else entry.key(kwargs)
        leaves, spec = entry.flatten_call(args, kwargs)
    except InteropError as error:
        report.refuse(error)
    else:
        (_InTorch if entry.host is TORCH else _InJax)(report, leaves, spec, key, names).explain()
    return report.done()


class _Names(NamedTuple):
    """What is called otherwise than its place in the call says: what a module gives its function, and is given back.

    Attributes:
        leaves: names by the identity of the leaves.
        state: names of the leaves of a new state; None where the result is the function's own.
    """

    leaves: dict[int, str] = {}  # noqa: RUF012 - nobody writes to it
    state: tuple[str, ...] | None = None

    def of_result(self, route: tuple[str, ...]) -> str:
        """The name of a leaf of the result."""
        if self.state is None:
            return f"result{''.join(route)}"
        is_state, *rest = route  # (out, [new state])
        return f"result{''.join(rest)}" if is_state == "[0]" else f"state.{self.state[int(rest[0].strip('[]'))]}"


def _called(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], _Names]:
    """The crossing that a call calls, with what arguments, and the names of what a module adds to them."""
    if isinstance(fn, WrappedJaxFunction):
        with torch.random.fork_rng([t.device for t in fn.parameters() if t.is_cuda][:1]):
            own, kwargs, names = fn._own_named(len(args), kwargs)
        state = fn._function.state.names if fn._function.state else ()
        return fn._crossed, (own, *args), kwargs, _Names(names, state if fn._function.has_modes else None)
    if isinstance(fn, functools.partial):
        args, kwargs = (*fn.args, *args), {**fn.keywords, **kwargs}
        if fn.func is by_position and len(args) > 2:
            apply, names, params, *rest = args
            return _called(apply, (by_name(names, params), *rest), kwargs)
        return _called(fn.func, args, kwargs)
    if isinstance(fn, types.MethodType):  # a class method, since Python 3.13: before, the crossing bound itself
        return _called(fn.__func__, (fn.__self__, *args), kwargs)
    return fn, args, kwargs, _Names()


class _Report:
    """An explanation while it is put together."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.record = entry.record
        self.leaves: list[Row] = []
        self.outputs: list[Row] = []
        self.gradient = ""
        self.retraces: list[str] = []
        self.notes: list[str] = []
        self.refused: str | None = None

    def refuse(self, error: InteropError, spec: Spec | None = None) -> None:
        """Tell of an error that the call would raise, of several the first."""
        words = str(located(error, self.record.name, spec))
        self.refused = self.refused or words

    def done(self) -> Explanation:
        """The explanation."""
        record = self.record
        if not record.differentiable:
            self.gradient = "refused. Stack @differentiable"
        elif not self.gradient:
            self.gradient = "not known: " + ("the call is refused" if self.refused else "the outputs can't be inferred")
        if not record.jittable:
            tracers = "torch.compile breaks its graph" if record.host is TORCH else "a compiled program raises"
            self.notes.append(f"it is not jittable: {tracers}. Stack @jittable")
        return Explanation(
            record.name,
            record.guest.name,
            self.entry.host.name,
            tuple(level for level in ("differentiable", "jittable") if getattr(record, level)),
            tuple(self.leaves),
            tuple(self.outputs),
            self.gradient,
            tuple(self.retraces),
            tuple(self.notes),
            self.refused,
        )


class _Host:
    """What is the same in both hosts."""

    def __init__(self, report: _Report, leaves: Sequence[Leaf], spec: Spec, key: list[Leaf], names: _Names) -> None:
        self.report, self.entry, self.record = report, report.entry, report.record
        self.leaves, self.spec, self.key = leaves, spec, key
        self.names = names
        self.paths = [names.leaves.get(id(leaf)) or path for leaf, path in zip(leaves, _paths(spec), strict=True)]
        self.indices = list(range(len(leaves)))
        self.numbers_are_static = self.entry.bakes_numbers

    def explain(self) -> None:
        """Fill in the report."""
        gradients = [""] * len(self.leaves)
        given: Sequence[Leaf] = self.leaves
        impls: tuple[str | None, ...] = ()
        try:
            given, impls = self.entry.converted(self.leaves, self.spec)
        except InteropError as error:
            self.report.refuse(error, self.spec)
        x64 = in_64_bits(given)
        crossed = [self._crosses(index, x64=x64) for index in range(len(self.leaves))]
        if self.report.refused is None:
            try:
                for flat, ins, indices in self._ways(given, impls):
                    self.indices = indices
                    for index, words in zip(indices, self._infer(flat, ins), strict=False):
                        gradients[index] = words
            except InteropError as error:
                self.report.refuse(error, self.spec)
        self._add_leaves(crossed, gradients)
        self._add_retraces()

    def _ways(
        self, given: Sequence[Leaf], impls: tuple[str | None, ...]
    ) -> Iterator[tuple[Any, list[Leaf], list[int]]]:
        """The flat functions that a call tries, in order; what they are given, and which of the leaves that are."""
        every, kinds = list(range(len(given))), self.spec.kinds
        if Kind.NUMBER not in kinds or not self.numbers_are_static:
            yield self.entry.flat_of(self.spec, impls), [*given, *self.key], every
        if Kind.NUMBER in kinds and self.numbers_are_static:
            flat, rest = self.entry.baked(given, self.spec, impls)
            yield flat, [*rest, *self.key], [i for i in every if kinds[i] is not Kind.NUMBER]

    def _infer(self, flat: Any, ins: list[Leaf]) -> Sequence[str]:
        """Add the outputs to the report, and what is known of derivatives; for each leaf whether it has one."""
        raise NotImplementedError

    def _outputs(self, infer: Callable[[], Outputs]) -> Outputs | None:
        """What `infer` finds out; None if it can't, which is noted, or if the numbers have to be constants first."""
        try:
            return infer()
        except AbstractEvalError as error:
            self.report.notes.append(f"{error.what}. {error.hint}")
        except InteropError as error:
            self.report.refuse(error, self.spec)
        except Exception as error:  # noqa: BLE001 - of the function: a call would raise it, or need no trace
            if Kind.NUMBER in self.spec.kinds and not self.numbers_are_static and needs_value(error):
                self.numbers_are_static = True
            else:
                self.report.notes.append(f"its outputs can't be inferred: {named(error)}")
        return None

    def _add_outputs(self, outputs: Outputs, how: str, why: str, gradient: Callable[[int], str]) -> None:
        tree: Tree = outputs.structure.value
        for index, aval in enumerate(outputs.avals):
            row = Row(self.names.of_result(tree.routes()[index]), describe(aval), how, why, gradient(index))
            self.report.outputs.append(row)

    def _add_leaves(self, crossed: list[tuple[str, str]], gradients: list[str]) -> None:
        """A row for each leaf, those that are static among them, in the order of the call."""
        dynamic = iter(range(len(self.leaves)))
        for name, tree in zip(self.spec.names, self.spec.trees, strict=True):
            for route, token in tree.places():
                if isinstance(token, StaticLeaf):
                    if self.names.leaves and name == self.spec.names[0]:
                        continue  # of the module's own
                    self.report.leaves.append(Row(name + "".join(route), _short(token.value), "static", "", ""))
                    continue
                i = next(dynamic)
                leaf, cross = self.leaves[i], crossed[i]
                if token is Kind.NUMBER and self.numbers_are_static and self.entry.host is TORCH:
                    cross = "static", "a trace needs its value"
                value = _short(leaf) if token is Kind.NUMBER else describe(leaf)
                self.report.leaves.append(Row(self.paths[i], value, *cross, gradients[i]))
        if self.key:
            self.report.leaves.append(Row(str(self.entry.rng), describe(self.key[0]), "copied", "it seeds torch", ""))

    def _crosses(self, index: int, *, x64: bool) -> tuple[str, str]:
        """How a leaf crosses; where it does not, the report says the error."""
        leaf, kind = self.leaves[index], self.spec.kinds[index]
        try:
            how = crosses(self.entry.host, leaf, kind, index, x64=x64, jit=self.record.jit)
            if self.entry.host is TORCH and kind is Kind.TENSOR and how[0] != "traced":
                argument_of(leaf, x64=x64)  # a value may be what is refused
        except InteropError as error:
            self.report.refuse(error.at(index), self.spec)
            return "refused", error.what
        return how

    def _add_retraces(self) -> None:
        """What a trace of this call belongs to."""
        rows = self.report.leaves
        shaped = [row.path for row in rows if row.how not in ("static", "refused") and "[" in row.value]
        static = [row.path for row in rows if row.how == "static"]
        for what, paths in (("another shape or dtype of", shaped), ("another value of", static)):
            if paths:
                self.report.retraces.append(f"{what} {_listed(paths)}")


class _InTorch(_Host):
    """A JAX function that torch calls."""

    def _infer(self, flat: Any, ins: list[Leaf]) -> Sequence[str]:
        report, active = self.report, _in_torch.asked(ins)
        refuse_two_devices([x if isinstance(x, torch.Tensor) else torch.zeros(()) for x in ins])
        try:
            if any(active):
                _in_torch.check_differentiable(flat, active)
        except NotDifferentiableError as error:
            report.refuse(error, self.spec)
            return ["refused" if a else "" for a in active]
        flat, tensors = _in_torch.lifted(flat, ins)
        outputs = self._outputs(lambda: flat.outputs(_in_torch.avals_of(flat, tensors)))
        if outputs is None:
            return ()
        plan, gradients = self._plan(flat, tensors, active, outputs)
        jitted = self.record.jit
        how = ("shared", "it is the caller's") if jitted else ("copied", "a function that is not traced may keep it")
        rough = plan.rough if plan else ()
        self._add_outputs(outputs, *how, lambda i: ("none" if i in rough else "yes") if plan else "")
        if flat.x64:
            report.notes.append("it is computed in 64 bits, with every constant that it makes")
        if outputs.effects:
            report.notes.append("it has effects (a print, a callback), which happen once a call")
        if not jitted:
            report.notes.append("it is not traced (jit=False): it runs operation by operation, on copies")
        return gradients

    def _plan(self, flat: Any, tensors: list[torch.Tensor], active: Mask, outputs: Outputs) -> tuple[Any, list[str]]:
        """How the backward would go, and for each leaf whether it has a gradient."""
        report = self.report
        inexact = [x.is_floating_point() or x.is_complex() for x in tensors]
        gradients = [("yes" if a else "not asked") if i else "" for a, i in zip(active, inexact, strict=True)]
        if not self.record.differentiable:
            return None, [""] * len(tensors)
        if not any(active):
            report.gradient = "not asked: no argument requires grad"
            return None, gradients
        if not flat.levels.jit:
            report.gradient = "JAX's own pull-back of the call is kept"
            return None, gradients
        if outputs.effects:
            report.gradient = "of the function without its effects, which are run first"
            return None, gradients
        forward = _in_torch.with_residuals(flat, active, watched=True)
        full = self._outputs(lambda: forward.outputs(_in_torch.avals_of(flat, tensors)))
        if full is None:
            return None, gradients
        plan: _in_torch.Plan = full.structure.value
        residuals = full.avals[plan.count :]
        reached = plan.reach(active, (True,) * plan.count)
        gradients = ["none: no output depends on it" if a and not r else g
                     for a, r, g in zip(active, reached, gradients, strict=True)]  # fmt: skip
        kept = kept_words(plan.saved, residuals, lambda i: self.paths[self.indices[i]], plan.structure)
        source = "computed with the value" if plan.scaled else "captured"
        report.gradient = f"{source}, kept for the backward: {kept}{_size(residuals)}"
        return plan, gradients

    def _add_retraces(self) -> None:
        if self.record.jit:
            super()._add_retraces()


class _InJax(_Host):
    """A torch function that JAX calls."""

    def _infer(self, flat: Any, ins: list[Leaf]) -> Sequence[str]:
        flat = flat.here()
        avals = tuple(map(aval_of, ins))
        active = tuple(map(_in_jax.is_inexact, avals))
        refused = (*flat.nondiff, *(False,) * (len(active) - len(flat.nondiff)))
        outputs = self._outputs(lambda: flat.outputs(avals))
        if self.record.differentiable:
            wanted = tuple(a and not r for a, r in zip(active, refused, strict=True))
            self._explain_gradient(flat, avals, wanted, outputs)
        if outputs is not None:
            inexact = map(_in_jax.is_inexact, outputs.avals)
            there = ["yes" if i and self.record.differentiable else "" for i in inexact]
            self._add_outputs(outputs, "copied", "the function may keep it", there.__getitem__)
            if outputs.random:
                self.report.notes.append("it draws from torch's generator: in a compiled program, an effect")
        if not self.record.differentiable:
            return ()
        asked = zip(active, refused, strict=True)
        return ["refused: nondiff_argnames" if a and r else "yes" if a else "" for a, r in asked]

    def _explain_gradient(self, flat: Any, avals: tuple[Aval, ...], active: Mask, outputs: Outputs | None) -> None:
        report = self.report
        try:
            _in_jax.check_differentiable(flat, active)
            found = _in_jax.capture_or_reason(flat, avals, active) if outputs and any(active) else None
        except Exception as error:  # noqa: BLE001 - of the function: a derivative would raise it
            if isinstance(error, InteropError):
                located(error, self.record.name)
            report.gradient = f"refused: {named(error)}"
            return
        report.gradient = "eagerly by torch's own graph of the call"
        if found is None:
            return
        report.gradient += "; in a trace "
        if isinstance(found, _in_jax.Capture):
            kept = kept_words(found.saved, found.residuals, flat.path, outputs.structure if outputs else NOTHING)
            report.gradient += f"captured, kept for the backward: {kept}{_size(found.residuals)}"
        elif outputs and outputs.random:
            report.gradient += f"refused: it can't be captured ({found}), and would draw other numbers"
        else:
            report.gradient += f"by running the function again: it can't be captured ({found})"

    def _add_retraces(self) -> None:
        super()._add_retraces()
        if self.report.retraces:
            self.report.retraces.append("other modes of torch or of a module")
            self.report.notes.append("eagerly nothing is traced")


# --- words ------------------------------------------------------------------------------------------------------------


def _paths(spec: Spec) -> list[str]:
    return [n + p for n, tree in zip(spec.names, spec.trees, strict=True) for p in tree.paths()]


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 32 else f"{words[:29]}..."


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths) if len(paths) <= 8 else f"{', '.join(paths[:7])} and {len(paths) - 7} more"


def _size(avals: Sequence[Aval]) -> str:
    """How much memory residuals take."""
    count = sum(int(np.prod(aval.shape)) * aval.dtype.itemsize for aval in avals)
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f" ({count / size:.1f} {unit} of its own)"
    return f" ({count} bytes of its own)" if count else ""
