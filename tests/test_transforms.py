"""Every transform of either host over every case, against the same mathematics in the host alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cases import CASES, Case
from hosts import HOSTS, Host, Tree, assert_same

# What a cell may raise while it is a gap. A wrong number is not among them.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError)

# Cells that do not pass, with the reason. A case "*" stands for all of them. A gap that closes fails its test.
GAPS: dict[tuple[str, str, str], str] = {}

ALWAYS: Callable[[Case], bool] = lambda case: True  # noqa: E731
HAS_DERIVATIVE: Callable[[Case], bool] = lambda case: bool(case.active)  # noqa: E731
# A few cases of different kinds, for what is slow: one of each arity, pytree, dtype and kind of mathematics.
CORE = {
    "scalar",
    "elementwise",
    "several_outputs",
    "mask_output",
    "named_tuples",
    "rows_by_index",
    "softmax",
    "solve",
    "scan",
}
HAS_JACOBIAN: Callable[[Case], bool] = lambda case: case.id in CORE  # noqa: E731

# name -> which cases it applies to
TRANSFORMS: dict[str, Callable[[Case], bool]] = {
    "call": ALWAYS,
    "compile": ALWAYS,
    "gradient": HAS_DERIVATIVE,
    "gradient_of_sum": HAS_DERIVATIVE,
    "gradient_through_transpose": HAS_DERIVATIVE,
    "functional_gradient": HAS_DERIVATIVE,
    "second": HAS_DERIVATIVE,
    "compiled_gradient": HAS_DERIVATIVE,
    "checkpoint": HAS_DERIVATIVE,
    "jvp": HAS_DERIVATIVE,
    "jacrev": HAS_JACOBIAN,
    "jacfwd": HAS_JACOBIAN,
    "hessian": HAS_JACOBIAN,
}


# What torch alone has, and the transform of the native function that it is compared with.
IN_TORCH: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "third": ("third", HAS_DERIVATIVE),
    "batch_of_cotangents": ("one_cotangent_after_the_other", HAS_DERIVATIVE),
    "dual": ("dual", HAS_DERIVATIVE),
    "linearize": ("linearize", HAS_DERIVATIVE),
    "functionalize": ("call", ALWAYS),
    "saved_on_cpu": ("gradient", HAS_DERIVATIVE),
    "reentrant_checkpoint": ("gradient", HAS_DERIVATIVE),
    "inference": ("call", ALWAYS),
    "autocast": ("call", ALWAYS),
    "graph": ("call", ALWAYS),
    "symbolic_graph": ("call", ALWAYS),
    "graph_of_gradient": ("functional_gradient", HAS_DERIVATIVE),
    "compile_dynamic": ("call", ALWAYS),
    "compiled_gradient_dynamic": ("gradient", HAS_DERIVATIVE),
}


def cells(transforms: dict[str, Callable[[Case], bool]], hosts: Sequence[str] = ("torch", "jax")) -> list[Any]:
    """The parameters of a test: every host, transform and case that go together."""
    return [
        pytest.param(HOSTS[host], transform, case, id=f"{host}-{transform}-{case.id}")
        for host in hosts
        for transform, applies in transforms.items()
        for case in CASES
        if applies(case)
    ]


def check(host: Host, transform: str, case: Case, got: Callable[[], Tree], expected: Callable[[], Tree]) -> None:
    """The two agree; or, where the table names a gap, the first raises."""
    reason = GAPS.get((host.name, transform, case.id)) or GAPS.get((host.name, transform, "*"))
    if reason is None:
        assert_same(got(), expected(), case.tolerance)
        return
    with pytest.raises(REFUSALS):
        got()


@functools.cache
def native(host: Host, transform: str, case: Case) -> Tree:
    """The host's own function under a transform, which more than one cell is compared with."""
    return getattr(host, transform)(host.flat(host.native(case), case), host.leaves(case), case.active)


@functools.cache
def native_examples(host: Host, case: Case) -> Tree:
    """The host's own function of each of a batch of examples."""
    return one_by_one(host, host.flat(host.native(case), case), host.batched(case), (0,) * len(case.leaves))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_table_itself_agrees(case: Case) -> None:
    """Both functions of a case are the same mathematics, in their own framework."""
    torch_host, jax_host = HOSTS["torch"], HOSTS["jax"]
    assert_same(native(torch_host, "call", case), native(jax_host, "call", case), case.tolerance)


@pytest.mark.parametrize(("host", "transform", "case"), cells(TRANSFORMS))
def test_transform(host: Host, transform: str, case: Case) -> None:
    """A crossing under a transform is the host's own function under it."""
    apply, ours = getattr(host, transform), host.flat(host.cross(case), case)
    pure = {"compile": "call", "compiled_gradient": "gradient", "checkpoint": "gradient"}.get(transform, transform)
    check(
        host, transform, case,
        lambda: apply(ours, host.leaves(case), case.active),
        lambda: native(host, pure, case),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's, in linearize
@pytest.mark.parametrize(
    ("host", "transform", "case"), cells({name: applies for name, (_, applies) in IN_TORCH.items()}, ["torch"])
)
def test_transform_of_torch(host: Host, transform: str, case: Case) -> None:
    """What torch has and JAX has not."""
    apply, ours = getattr(host, transform), host.flat(host.cross(case), case)
    check(
        host, transform, case,
        lambda: apply(ours, host.leaves(case), case.active),
        lambda: native(host, IN_TORCH[transform][0], case),
    )  # fmt: skip


def test_a_gap_that_closes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table can't outlive its reasons."""
    monkeypatch.setitem(GAPS, ("torch", "call", "scalar"), "closed long ago")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_transform(HOSTS["torch"], "call", CASES[0])


# An empty array has nothing to take differences of.
CHECKED = [case for case in CASES if case.active and case.is_single and case.id != "empty"]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.id)
def test_gradcheck(case: Case) -> None:
    """Torch's own check against differences, in double precision: backward, forward mode, and batches of both."""
    host = HOSTS["torch"]
    leaves = [host.leaf(doubled(x)) for x in case.leaves]
    part = host.of_active(host.flat(host.cross(case), case), leaves, case.active)
    inputs = [leaves[i].requires_grad_() for i in case.active]
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(part, inputs, **options)


@pytest.mark.parametrize("case", [case for case in CHECKED if case.id in CORE], ids=lambda case: case.id)
def test_gradgradcheck(case: Case) -> None:
    """The same of the gradient."""
    host = HOSTS["torch"]
    leaves = [host.leaf(doubled(x)) for x in case.leaves]
    part = host.of_active(host.flat(host.cross(case), case), leaves, case.active)
    inputs = [leaves[i].requires_grad_() for i in case.active]
    assert torch.autograd.gradgradcheck(part, inputs, check_batched_grad=True, check_fwd_over_rev=True)


# --- batches ----------------------------------------------------------------------------------------------------------


def one_by_one(host: Host, fn: Callable[..., Tree], leaves: Sequence[Any], axes: Sequence[int | None]) -> Tree:
    """What `vmap` means: the examples in a loop, stacked."""
    take = lambda x, axis, i: x if axis is None else (x[i] if axis == 0 else x[..., i])  # noqa: E731
    results = [fn(*(take(x, axis, i) for x, axis in zip(leaves, axes, strict=True))) for i in range(2)]
    return jax.tree.map(lambda *xs: host.stack(xs), *results)


@pytest.mark.parametrize(("host", "transform", "case"), cells({"vmap": lambda case: case.vmap}))
def test_vmap(host: Host, transform: str, case: Case) -> None:
    """Every leaf batched along its first axis."""
    axes, ours = (0,) * len(case.leaves), host.flat(host.cross(case), case)
    check(
        host, transform, case,
        lambda: host.map(ours, host.batched(case), axes),
        lambda: native_examples(host, case),
    )  # fmt: skip


@pytest.mark.parametrize(("host", "transform", "case"), cells({"vmap_of_one": lambda case: case.vmap}))
def test_vmap_of_one_leaf(host: Host, transform: str, case: Case) -> None:
    """The first leaf batched along its last axis, the others shared by all examples."""
    leaves, batched = host.leaves(case), host.batched(case)
    leaves[0] = jnp.moveaxis(batched[0], 0, -1) if host.name == "jax" else batched[0].movedim(0, -1)
    axes = (-1,) + (None,) * (len(leaves) - 1)
    ours, theirs = host.flat(host.cross(case), case), host.flat(host.native(case), case)
    check(
        host, transform, case,
        lambda: host.map(ours, leaves, axes),
        lambda: one_by_one(host, theirs, leaves, axes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("host", "transform", "case"), cells({"vmap_of_gradient": lambda case: case.vmap and HAS_DERIVATIVE(case)})
)
def test_vmap_of_gradient(host: Host, transform: str, case: Case) -> None:
    """Per-example gradients."""
    axes, active = (0,) * len(case.leaves), case.active

    def gradient(fn: Callable[..., Tree]) -> Callable[..., Tree]:
        flat = host.flat(fn, case)
        return lambda *xs: host.functional_gradient(flat, list(xs), active)

    check(
        host, transform, case,
        lambda: host.map(gradient(host.cross(case)), host.batched(case), axes),
        lambda: one_by_one(host, gradient(host.native(case)), host.batched(case), axes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("host", "transform", "case"), cells({"gradient_of_vmap": lambda case: case.vmap and HAS_DERIVATIVE(case)})
)
def test_gradient_of_vmap(host: Host, transform: str, case: Case) -> None:
    """The gradient of a batch."""
    axes = (0,) * len(case.leaves)
    ours, theirs = host.flat(host.cross(case), case), host.flat(host.native(case), case)
    check(
        host, transform, case,
        lambda: host.gradient(lambda *xs: host.map(ours, list(xs), axes), host.batched(case), case.active),
        lambda: host.gradient(lambda *xs: one_by_one(host, theirs, xs, axes), host.batched(case), case.active),
    )  # fmt: skip


@pytest.mark.parametrize(("host", "transform", "case"), cells({"compiled_batch_of_gradients": HAS_JACOBIAN}))
def test_compiled_batch_of_gradients(host: Host, transform: str, case: Case) -> None:
    """Three transforms deep."""
    axes, active = (0,) * len(case.leaves), case.active

    def gradient(fn: Callable[..., Tree]) -> Callable[..., Tree]:
        flat = host.flat(fn, case)
        return lambda *xs: host.functional_gradient(flat, list(xs), active)

    ours = gradient(host.cross(case))
    check(
        host, transform, case,
        lambda: host.compile(lambda *xs: host.map(ours, list(xs), axes), host.batched(case), case.active),
        lambda: one_by_one(host, gradient(host.native(case)), host.batched(case), axes),
    )  # fmt: skip


# --- control flow of JAX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "transform", "case"), cells({"scan": ALWAYS}, ["jax"]))
def test_scan(host: Host, transform: str, case: Case) -> None:
    """As the body of a loop."""
    ours = host.flat(host.cross(case), case)
    check(
        host, transform, case,
        lambda: host.scan(ours, host.batched(case), ()),
        lambda: native_examples(host, case),
    )  # fmt: skip


@pytest.mark.parametrize(("host", "transform", "case"), cells({"cond": ALWAYS}, ["jax"]))
def test_cond(host: Host, transform: str, case: Case) -> None:
    """As a branch."""
    ours = host.flat(host.cross(case), case)
    check(
        host, transform, case,
        lambda: host.cond(ours, host.leaves(case), ()),
        lambda: native(host, "call", case),
    )  # fmt: skip


# --- double precision -------------------------------------------------------------------------------------------------


def doubled(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array in double precision, if it is of floating-point numbers."""
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) if x.dtype.kind in "fc" else x


# A constant has the precision of the framework that makes it.
DOUBLE = [case for case in CASES if case.active and case.is_single and case.id != "constant_output"]


@pytest.mark.parametrize(
    ("case", "transform"),
    [pytest.param(case, "gradient", id=f"{case.id}-gradient") for case in DOUBLE]
    + [pytest.param(case, t, id=f"{case.id}-{t}") for case in DOUBLE if case.id in CORE for t in ("call", "second")],
)
def test_double_precision_in_torch(case: Case, transform: str) -> None:
    """A float64 tensor is computed in float64, forward and backward, while JAX keeps 32 bits for everybody else."""
    assert not jax.config.jax_enable_x64
    host = HOSTS["torch"]
    leaves = [host.leaf(doubled(x)) for x in case.leaves]
    apply = getattr(host, transform)
    got = apply(host.flat(host.cross(case), case), leaves, case.active)
    with _default_dtype(torch.float64):
        expected = apply(host.flat(host.native(case), case), leaves, case.active)
    assert_same(got, expected, 1e-11)
    assert jnp.ones(()).dtype == jnp.float32


class _default_dtype:  # noqa: N801 - a context, named as what it sets
    """torch's default dtype for a block: constants of a native function are then as precise as JAX's are under x64."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize(
    ("case", "transform"),
    [pytest.param(case, "compiled_gradient", id=f"{case.id}-compiled_gradient") for case in DOUBLE]
    + [pytest.param(case, "gradient", id=f"{case.id}-gradient") for case in DOUBLE if case.id in CORE],
)
def test_double_precision_in_jax(case: Case, transform: str) -> None:
    """With x64 on, arrays of 64 bits cross as they are."""
    host = HOSTS["jax"]
    with jax.enable_x64(True), _default_dtype(torch.float64):
        leaves = [host.leaf(doubled(x)) for x in case.leaves]
        apply = getattr(host, transform)
        got = apply(host.flat(host.cross(case), case), leaves, case.active)
        assert_same(got, apply(host.flat(host.native(case), case), leaves, case.active), 1e-11)
