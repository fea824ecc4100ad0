"""Every operator of torch's own database, crossed into JAX, against torch's own result in every mode.

    python tests/operators.py                     run all, print what fails
    python tests/operators.py --write             the same, and write examples/operators.md
    python tests/operators.py --dtype float64 svd fft_fft

An operator runs in a worker process: one that crashes or hangs is recorded like one that raises.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import types
import unittest
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from interop import as_jax, differentiable, jittable

# torch's database stands beside its test classes, one of which is made from this package. No test of it runs here.
sys.modules.setdefault("expecttest", types.ModuleType("expecttest")).__dict__.setdefault("TestCase", unittest.TestCase)

Leaves = Sequence[torch.Tensor]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "operators.md"
DTYPES = ("float32", "float64", "complex64")
TOLERANCE = {"float32": 2e-3, "complex64": 2e-3, "float64": 1e-6}
LARGEST = 20_000  # numbers in a sample
PATIENCE = 120  # seconds for one operator

# What is not asked, and why. Operators that draw random numbers are found by watching them.
SKIPPED = {
    "empty": "its values are not defined",
    "empty_like": "its values are not defined",
    "empty_permuted": "its values are not defined",
    "empty_strided": "its values are not defined",
    "new_empty": "its values are not defined",
    "new_empty_strided": "its values are not defined",
}


# --- cases ------------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """An operator of the database, or that which writes its result to its first argument."""

    op: Any
    call: Callable[..., Any]
    writes: bool = False


class NoCaseError(Exception):
    """There is nothing to compare, and why."""


class RandomError(NoCaseError):
    """The operator draws random numbers."""


@dataclass
class Case:
    """One operator on one sample, as a function of tensors alone.

    Attributes:
        fn: tensors to the tensors of the result; what is no tensor is closed over. It may write to its arguments.
        smooth: the same where it has a derivative: on Hermitian matrices, of a decomposition its product, and so on,
            as torch's database says.
        leaves: the tensors of the sample.
        active: those that are differentiated.
        batched: those that are stacked for `vmap`.
    """

    fn: Callable[..., list[torch.Tensor]]
    smooth: Callable[..., list[torch.Tensor]]
    leaves: list[torch.Tensor]
    active: list[int]
    batched: list[int]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def noise(x: torch.Tensor) -> torch.Tensor:
            return torch.randn(x.shape, dtype=x.dtype, generator=generator)

        outs = apart(self.smooth)(*self.leaves)
        self.inexact = [i for i, out in enumerate(outs) if _is_inexact(out)]
        self.weights = [noise(outs[i]) for i in self.inexact]
        self.directions = [noise(self.leaves[i]) for i in self.active]
        self.rows = [
            [x * (1 - 0.05 * k) if _is_inexact(x) else x for k in range(3)] if i in self.batched else [x]
            for i, x in enumerate(self.leaves)
        ]


def apart(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function on copies of its arguments: JAX's are never written to."""
    return lambda *xs: fn(*[x.clone() for x in xs])


def cases(variant: Variant, dtype: torch.dtype, count: int) -> Iterator[Case]:
    """The operator on some of its samples: the first that can cross, small ones without empty tensors before others."""
    torch.manual_seed(0)
    op = variant.op
    wants_grad = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    with running("torch makes no samples of it here"):
        samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=wants_grad), 100))
    found, why = 0, "no samples"
    order = dict.fromkeys([0, len(samples) // 2, *range(len(samples))]) if samples else {}  # neighbours are alike
    for sample in sorted((samples[i] for i in order), key=_is_odd):
        if found == count:
            return
        try:
            case = case_of(variant, sample, dtype)
        except RandomError:
            if not found:  # the operator draws; a later sample may only have nothing to draw for
                raise
            continue
        except NoCaseError as error:
            why = str(error)
            continue
        found += 1
        yield case
    if not found:
        raise NoCaseError(why)


def _is_odd(sample: Any) -> bool:
    """Whether one of its tensors is empty, or all of them are large."""
    tensors = [x for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
    return any(x.numel() == 0 for x in tensors) or sum(x.numel() for x in tensors) > LARGEST


def case_of(variant: Variant, sample: Any, dtype: torch.dtype) -> Case:
    """The operator as a function of the tensors in this sample."""
    if variant.writes and sample.broadcasts_input:
        raise NoCaseError("its result is larger than what it would be written to")
    parts, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor)]
    tensors = [parts[i] for i in places]
    kinds = [x.dtype for x in tensors]
    for x in tensors:
        if x.layout is not torch.strided or x.is_quantized or x.is_nested:
            raise NoCaseError("its samples are not dense")
        if x.dtype in (torch.float64, torch.complex128) and dtype is not torch.float64:
            raise NoCaseError("its samples are of 64 bits")
        if x.dtype is torch.complex32:
            raise NoCaseError("its samples are complex32")
    active = [i for i, x in enumerate(tensors) if x.requires_grad]
    leaves = [x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format) for x in tensors]
    batched = [i for i, x in enumerate(leaves) if _is_inexact(x)] or list(range(len(leaves)))

    def call(run: Callable[..., Any], *xs: torch.Tensor) -> Any:
        given = list(parts)
        for place, x, kind in zip(places, xs, kinds, strict=True):
            given[place] = x.to(kind)  # JAX keeps integers in 32 bits; as an index torch takes 64 alone
        x, args, kwargs = pytree.tree_unflatten(given, spec)
        return run(x, *args, **kwargs)

    def fn(*xs: torch.Tensor) -> list[torch.Tensor]:
        return _tensors(call(variant.call, *xs))

    def smooth(*xs: torch.Tensor) -> list[torch.Tensor]:
        run = functools.partial(variant.op.gradcheck_wrapper, variant.call)
        return _tensors(sample.output_process_fn_grad(call(run, *xs)))

    fn.__name__ = smooth.__name__ = variant.op.name.replace(".", "_")
    with running("torch does not run it on its samples"):
        first = apart(fn)(*leaves)
        with Watch() as watch:
            apart(fn)(*leaves)
    if watch.random:
        raise RandomError("it draws random numbers")
    if not first:
        raise NoCaseError("its result holds no tensor")
    if any(out.layout is not torch.strided or out.is_quantized or out.is_nested for out in first):
        raise NoCaseError("its result is not dense")
    if any(out.dtype is torch.complex32 for out in first):
        raise NoCaseError("its result is complex32")
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    if not all(near(a, b, tolerance) for a, b in zip(first, apart(fn)(*leaves), strict=True)):
        raise RandomError("its result differs from run to run")
    return Case(fn, smooth, leaves, active, batched)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two runs gave the same; at another address the last bits may differ."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _is_inexact(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def running(otherwise: str) -> Iterator[None]:
    """What torch itself raises here says that there is nothing to compare."""
    try:
        yield
    except Exception as error:
        raise NoCaseError(f"{otherwise} ({type(error).__name__})") from error


class Watch(TorchDispatchMode):
    """Sees whether the generator moves: also where an operator sets its seed before, and the state back after."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        result = func(*args, **(kwargs or {}))
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            self.random = True
        return result


# --- torch's own results ----------------------------------------------------------------------------------------------


def _functional(outs: Sequence[Any], inexact: Sequence[int], weights: Sequence[Any]) -> Any:
    """A fixed linear functional of the inexact outputs; in either framework."""
    return sum((weight * outs[i]).sum().real for i, weight in zip(inexact, weights, strict=True))


def _along(case: Case) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """The smooth part as a function of the active tensors."""

    def part(*active: torch.Tensor) -> list[torch.Tensor]:
        xs = list(case.leaves)
        for i, x in zip(case.active, active, strict=True):
            xs[i] = x
        return apart(case.smooth)(*xs)

    return part, [case.leaves[i] for i in case.active]


def _loss(case: Case) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    part, active = _along(case)
    return lambda *xs: _functional(part(*xs), case.inexact, case.weights), active


def torch_value(case: Case) -> Leaves:
    """The result itself."""
    return apart(case.fn)(*case.leaves)


def torch_grad(case: Case) -> Leaves:
    """Reverse mode; JAX's gradient is the conjugate of torch's."""
    loss, active = _loss(case)
    xs = [x.clone().requires_grad_() for x in active]
    grads = torch.autograd.grad(loss(*xs), xs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.conj() for x, g in zip(xs, grads, strict=True)]


def torch_jvp(case: Case) -> Leaves:
    """Forward mode."""
    part, active = _along(case)

    def inexact(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = part(*xs)
        return tuple(outs[i] for i in case.inexact)

    return torch.func.jvp(inexact, tuple(active), tuple(case.directions))[1]


def torch_vmap(case: Case) -> Leaves:
    """One example after the other."""
    if not case.batched:
        raise NoCaseError("nothing to batch")
    examples = [apart(case.fn)(*[row[k] if len(row) > 1 else row[0] for row in case.rows]) for k in range(3)]
    return [torch.stack(column) for column in zip(*examples, strict=True)]


def torch_double_backward(case: Case) -> Leaves:
    """A Hessian-vector product, as torch's users write it."""
    loss, active = _loss(case)
    xs = [x.clone().requires_grad_() for x in active]
    grads = torch.autograd.grad(loss(*xs), xs, create_graph=True, allow_unused=True)
    slope = sum(
        (g * v.conj()).real.sum() for g, v in zip(grads, case.directions, strict=True) if g is not None and g.grad_fn
    )
    if isinstance(slope, int):
        raise NoCaseError("torch has recorded nothing; or the function is linear, as the other way will say")
    found = torch.autograd.grad(slope, xs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.conj() for x, g in zip(xs, found, strict=True)]


def torch_forward_over_reverse(case: Case) -> Leaves:
    """The same by `torch.func`, where the backward has no backward."""
    loss, active = _loss(case)
    places = tuple(range(len(active)))
    moved = torch.func.jvp(torch.func.grad(loss, argnums=places), tuple(active), tuple(case.directions))[1]
    return [g.conj() for g in moved]


# --- the same in JAX --------------------------------------------------------------------------------------------------


@dataclass
class Crossed:
    """A case on the other side."""

    case: Case
    promised: bool = False  # by example_output

    def __post_init__(self) -> None:
        self.fn = self.crossed(self.case.fn)
        self.smooth = self.crossed(self.case.smooth)
        self.arrays = arrays(self.case.leaves)
        self.weights = arrays(self.case.weights)
        self.directions = arrays(self.case.directions)

    def crossed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function in JAX, with all levels."""
        function = differentiable(as_jax(fn))
        if self.promised:
            return jittable(function, example_output=arrays(apart(fn)(*self.case.leaves)))
        return jittable(function)

    def along(self, fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[jax.Array]]:
        """The function of the active arrays."""

        def part(*active: jax.Array) -> Any:
            xs = list(self.arrays)
            for i, x in zip(self.case.active, active, strict=True):
                xs[i] = x
            return fn(*xs)

        return part, [self.arrays[i] for i in self.case.active]

    def loss(self, *xs: jax.Array) -> jax.Array:
        """The functional, of all arrays."""
        return _functional(self.smooth(*xs), self.case.inexact, self.weights)


def arrays(tensors: Leaves) -> list[jax.Array]:
    """The same numbers in JAX, in its own memory, integers in as many bits as it keeps; by no code of the library."""
    return [jnp.array(_array(x)) for x in tensors]


def jax_value(crossed: Crossed) -> Any:
    return crossed.fn(*crossed.arrays)


def jax_jit(crossed: Crossed) -> Any:
    return jax.jit(crossed.fn)(*crossed.arrays)


def jax_grad(crossed: Crossed) -> Any:
    return jax.grad(crossed.loss, argnums=tuple(crossed.case.active))(*crossed.arrays)


def jax_jit_grad(crossed: Crossed) -> Any:
    return jax.jit(jax.grad(crossed.loss, argnums=tuple(crossed.case.active)))(*crossed.arrays)


def jax_jvp(crossed: Crossed) -> Any:
    part, active = crossed.along(crossed.smooth)
    tangents = jax.jvp(part, active, crossed.directions)[1]
    return [tangents[i] for i in crossed.case.inexact]


def jax_vmap(crossed: Crossed) -> Any:
    rows = crossed.case.rows
    stacked = arrays([torch.stack(row) if len(row) > 1 else row[0] for row in rows])
    return jax.vmap(crossed.fn, in_axes=tuple(0 if len(row) > 1 else None for row in rows))(*stacked)


def jax_hvp(crossed: Crossed) -> Any:
    loss, active = crossed.along(crossed.loss)
    return jax.jvp(jax.grad(loss, argnums=tuple(range(len(active)))), active, crossed.directions)[1]


@dataclass(frozen=True)
class Mode:
    """A transform in JAX, and what torch says of it: one way, or another where the first does not run."""

    crossed: Callable[[Crossed], Any]
    references: tuple[Callable[[Case], Leaves], ...]
    derivative: bool = True


MODES: dict[str, Mode] = {
    "value": Mode(jax_value, (torch_value,), derivative=False),
    "jit": Mode(jax_jit, (torch_value,), derivative=False),
    "grad": Mode(jax_grad, (torch_grad,)),
    "jit(grad)": Mode(jax_jit_grad, (torch_grad,)),
    "jvp": Mode(jax_jvp, (torch_jvp,)),
    "vmap": Mode(jax_vmap, (torch_vmap,), derivative=False),
    "hvp": Mode(jax_hvp, (torch_double_backward, torch_forward_over_reverse)),
}


# --- the comparison ---------------------------------------------------------------------------------------------------

PASSED, NOT_COUNTED = "passed", "not counted"


def compare(variant: Variant, dtype: str, count: int, modes: Iterable[str] = MODES) -> dict[str, str]:
    """What became of each mode of the operator: passed, not counted, "refused: ...", or what went wrong."""
    found: dict[str, str] = dict.fromkeys(modes, NOT_COUNTED)
    with warnings.catch_warnings(), jax.enable_x64(dtype == "float64"):
        warnings.simplefilter("ignore")
        for case in cases(variant, getattr(torch, dtype), count):
            for mode in found:
                outcome = outcome_of(MODES[mode], Crossed(case), TOLERANCE[dtype])  # none learns from another
                found[mode] = max(found[mode], outcome, key=_weight)
    return found


KINDS = (NOT_COUNTED, PASSED, "refused", "failed")  # of two samples the worse counts


def kind_of(outcome: str) -> str:
    """Which of the four this is."""
    return outcome if outcome in KINDS else "refused" if outcome.startswith("refused") else "failed"


def _weight(outcome: str) -> int:
    return KINDS.index(kind_of(outcome))


def outcome_of(mode: Mode, crossed: Crossed, tolerance: float) -> str:
    """What became of one mode on one sample."""
    case = crossed.case
    if mode.derivative and not (case.active and case.inexact):
        return NOT_COUNTED
    references = [r for r in (_reference(of, case) for of in mode.references) if r is not None]
    if not references:
        return NOT_COUNTED
    try:
        return _agreed(mode, crossed, references, tolerance)
    except Exception as error:
        refusal = refusal_of(error, case)
        if refusal != NEEDS_VALUES:
            return refusal or said(error)
    try:
        outcome = _agreed(mode, Crossed(case, promised=True), references, tolerance)
    except Exception as error:
        outcome = said(error)
    return NEEDS_VALUES if outcome == PASSED else f"with example_output: {outcome}"


def _reference(of: Callable[[Case], Leaves], case: Case) -> Leaves | None:
    """Torch's own result; None where torch has none."""
    with contextlib.suppress(Exception):
        return [x.detach() for x in of(case)]
    return None


def _agreed(mode: Mode, crossed: Crossed, references: Sequence[Leaves], tolerance: float) -> str:
    results = jax.tree.leaves(mode.crossed(crossed))
    if differences(crossed.arrays, crossed.case.leaves, 0):
        return "wrong: an argument of the caller was written to"
    found = [differences(results, reference, tolerance) for reference in references]
    return PASSED if None in found else found[0]


def said(error: Exception) -> str:
    """The type of an exception and the first line of its message; under `jit` those of the exception below."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "Traceback" in str(error):
        lines = lines[-1:]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:250]


# What the library refuses by contract.
TOO_WIDE = "refused: a result of 64 bits has nowhere to go while x64 is off"
TOO_LARGE = "refused: an integer of 64 bits does not fit into 32"
NEEDS_VALUES = "refused: torch can't tell the shape of the result without values; right with example_output"


def refusal_of(error: Exception, case: Case) -> str | None:
    """By which sentence of the contract this is refused; None if it is a failure. The reason must be there."""
    text, dtypes = str(error), {x.dtype for x in torch_value(case)}
    if "nowhere to go" in text and dtypes & {torch.float64, torch.complex128}:
        return TOO_WIDE
    if "does not fit into" in text and dtypes & {torch.int64, torch.uint64}:
        return TOO_LARGE
    if "output shapes can't be inferred" in text and needs_values(case):
        return NEEDS_VALUES
    return None


def needs_values(case: Case) -> bool:
    """Whether torch cannot run it without values either."""
    try:
        with FakeTensorMode() as mode:
            case.smooth(*map(mode.from_tensor, case.leaves))
    except Exception:
        return True
    return False


def differences(results: Sequence[Any], reference: Leaves, tolerance: float) -> str | None:
    """In what the results differ; None if in nothing."""
    if len(results) != len(reference):
        return f"wrong: {len(results)} results, expected {len(reference)}"
    found = (difference(np.asarray(r), expected, tolerance) for r, expected in zip(results, reference, strict=True))
    return next(filter(None, found), None)


def difference(got: np.ndarray[Any, Any], expected: torch.Tensor, tolerance: float) -> str | None:
    """In what an array differs from a tensor; None if in nothing. With x64 off JAX keeps integers in 32 bits."""
    want = _array(expected)
    kept = jax.dtypes.canonicalize_dtype(want.dtype) if want.dtype.kind in "iu" else want.dtype
    if got.shape != want.shape or got.dtype != kept:
        return f"wrong: {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
    if got.dtype == jnp.bfloat16:
        got, want = got.astype(np.float32), want.astype(np.float32)
    if np.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        off = np.nanmax(np.abs(got.astype(np.complex128) - want), initial=0)
    return f"wrong: off by {off:.2g}, the largest is {np.nanmax(np.abs(want)):.2g}, {np.isnan(got).sum()} NaN, expected {np.isnan(want).sum()}"


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    if x.dtype is torch.bfloat16:
        return np.asarray(jnp.asarray(x.float().numpy()).astype(jnp.bfloat16))
    return x.numpy(force=True)


# --- the whole database -----------------------------------------------------------------------------------------------


def database() -> dict[str, Variant]:
    """The operators by name and variant, and those that write."""
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Variant] = {}
    for op in op_db:
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        found[name] = Variant(op, op.op)
        if op.inplace_variant is not None:
            found[f"{name}, in place"] = Variant(op, op.inplace_variant, writes=True)
    return found


def judge(name: str, variant: Variant, dtype: str, count: int) -> dict[str, Any]:
    """The record of one operator."""
    started = time.monotonic()
    record: dict[str, Any] = {"name": name, "dtype": dtype}
    if name in SKIPPED:
        record["skipped"] = SKIPPED[name]
    elif getattr(torch, dtype) not in variant.op.supported_dtypes("cpu"):
        record["skipped"] = "torch has no kernel of this dtype for it"
    else:
        try:
            record["modes"] = compare(variant, dtype, count)
        except NoCaseError as error:
            record["skipped"] = str(error)
    record["seconds"] = round(time.monotonic() - started, 2)
    return record


def work(dtype: str, count: int, names: Sequence[str]) -> None:
    """The life of a worker: says what it begins, and what came of it."""
    torch.set_num_threads(1)
    operators = database()
    for name in names:
        print(json.dumps({"begun": name}), flush=True)
        print(json.dumps(judge(name, operators[name], dtype, count)), flush=True)


def run(dtype: str, count: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of operators, from workers that are replaced when they crash or hang."""
    left = list(names)
    while left:
        chunk = left[:40]
        begun: str | None = None
        done: set[str] = set()
        for line in said_by([__file__, "--worker", dtype, str(count), *chunk]):
            record = json.loads(line) if line.startswith("{") else {}
            begun = record.get("begun", begun)
            if "name" in record:
                done.add(record["name"])
                yield record
        if begun is not None and begun not in done:
            done.add(begun)
            yield {
                "name": begun,
                "dtype": dtype,
                "modes": dict.fromkeys(MODES, "its process crashed or hung"),
                "seconds": 0,
            }
        if not done:
            raise RuntimeError("a worker did not start")
        left = [name for name in left if name not in done]


def said_by(arguments: Sequence[str]) -> Iterator[str]:
    """What a Python process prints, until it ends or is silent for too long."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in process.stdout:
            said.put(line)
        said.put(None)

    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        listener = threading.Thread(target=listen)
        listener.start()
        with contextlib.suppress(queue.Empty):
            while (line := said.get(timeout=PATIENCE)) is not None:
                yield line
        process.kill()
        listener.join()


# --- the page ---------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# The operators of torch, in JAX

`make operators` takes every operator of torch's own test database (`op_db`, in torch {torch}), and each that writes its
result in place, as a function of its tensors through `jittable(differentiable(as_jax(...)))`, and compares it with
torch's own result: the value, the value under `jax.jit`, the gradient of a random linear functional of the result, the
same under `jit`, the forward derivative, the function over a batch against a loop, and a Hessian-vector product by
forward over reverse mode against a double backward.

A pair of an operator and a mode is counted where torch itself has a result of that mode on one of {samples} samples, and
passes if all samples agree: dtypes and shapes the same, the caller's arrays left alone, and numbers within {tolerances}.
64-bit dtypes are asked with `jax_enable_x64` on. What is refused by contract, with an error that says what to do, is
in neither number: it is listed below, and so is what was not asked.
"""


def page(records: Sequence[dict[str, Any]], samples: int) -> str:
    """The page that says what works, what does not, and what was not asked."""
    tolerances = ", ".join(f"{t:g} ({name})" for name, t in TOLERANCE.items())
    parts = [INTRODUCTION.format(torch=torch.__version__.split("+")[0], samples=samples, tolerances=tolerances)]
    outcomes = [(r["name"], r["dtype"], m, o) for r in records for m, o in r.get("modes", {}).items()]
    parts += ["## In numbers\n", numbers(records)]
    failed: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    refused: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    skipped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, dtype, mode, outcome in outcomes:
        if kind_of(outcome) == "failed":
            failed[name, outcome].add((dtype, mode))
        elif kind_of(outcome) == "refused":
            refused[outcome.removeprefix("refused: ")][name] |= {dtype, mode}
    for record in records:
        if "skipped" in record:
            skipped[record["skipped"]][record["name"]].add(record["dtype"])
    rows = [(f"`{name}`", _words(d for d, _ in where), _words(m for _, m in where), _seen(outcome))
            for (name, outcome), where in sorted(failed.items())]  # fmt: skip
    parts += [
        "## What fails\n",
        _table(("operator", "dtypes", "modes", "what happens"), rows) if rows else "Nothing.\n",
    ]
    parts += ["## What is refused by contract\n", _lists(refused), "## What was not asked\n", _lists(skipped)]
    return "\n".join(parts)


def _seen(outcome: str) -> str:
    """What happened, as a cell of a table."""
    return "`" + outcome.replace("|", "/").replace("`", "'") + "`"


def numbers(records: Sequence[dict[str, Any]]) -> str:
    """The table of how many pairs passed."""
    counts = Counter((r["dtype"], m, kind_of(outcome)) for r in records for m, outcome in r.get("modes", {}).items())
    rows: list[tuple[str, ...]] = []
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        for name, modes in [*((mode, [mode]) for mode in MODES), ("**all**", list(MODES))]:
            passed, refused, failed = (sum(counts[dtype, mode, kind] for mode in modes) for kind in KINDS[1:])
            rate = f"{100 * passed / (passed + failed):.2f} %" if passed + failed else ""
            rows.append((dtype, name, *map(str, (passed + failed, passed, failed)), rate, str(refused)))
    return _table(("dtype", "mode", "counted", "passed", "failed", "", "refused"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _lists(found: dict[str, dict[str, set[str]]]) -> str:
    """Reasons, with the operators; and the dtypes and modes, where it is not all of them."""

    def named(name: str, where: set[str]) -> str:
        some = [word for words in (set(DTYPES), set(MODES)) if not words <= where for word in words & where]
        return f"`{name}` ({_words(some)})" if some else f"`{name}`"

    return "".join(
        f"- {reason} ({len(operators)}): {', '.join(named(*row) for row in sorted(operators.items()))}\n"
        for reason, operators in sorted(found.items())
    )


def _words(words: Iterable[str]) -> str:
    order = [*DTYPES, *MODES]
    return ", ".join(sorted(set(words), key=order.index))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="operators; all of them if none is named")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th operator, beginning with the i-th")
    parser.add_argument("--records", type=Path, help="a file that keeps the records; what it has is not run again")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write and (options.names or options.dtype or options.part != "1/1"):
        parser.error("the page is about all of them")
    part, parts = map(int, options.part.split("/"))
    names = (options.names or sorted(database()))[part - 1 :: parts]
    records = []
    if options.records and options.records.exists():
        records = [json.loads(line) for line in options.records.read_text().splitlines()]
    known = {(record["name"], record["dtype"]) for record in records}
    for dtype in options.dtype or DTYPES:
        for record in run(dtype, options.samples, [name for name in names if (name, dtype) not in known]):
            records.append(record)
            if options.records:
                with options.records.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            for mode, outcome in record.get("modes", {}).items():
                if kind_of(outcome) == "failed":
                    print(f"{dtype} {record['name']} {mode}: {outcome}", flush=True)
    if options.write:
        PAGE.write_text(page(records, options.samples))
    print(numbers(records))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
