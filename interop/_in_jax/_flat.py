"""A flat torch function, and how it runs on arrays on the caller's thread."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import numpy as np
import torch

from interop._abstract import (
    Aval,
    Outputs,
    aval_of,
    check_promise,
    check_structure,
    infer_followed,
    infer_torch,
    narrowed,
)
from interop._derive import NOTHING, Axes, Flat, FlatFn, Mask, Static, derive_vjp, derive_vmap
from interop._errors import DeviceError, InteropError, NotDifferentiableError, PrecisionError
from interop._in_jax._graph import Graph
from interop._in_jax._random import InOrder, seeding
from interop._in_jax._surroundings import TorchState
from interop._in_jax._ways import (
    again,
    composite,
    first_that_runs,
    followed,
    jvp_by_autograd,
    jvp_by_forward_mode,
    jvp_by_transposes,
    loop,
    vjp_by_autograd,
    vmap_with,
)
from interop._leaf import (
    AT_HOME,
    NUMPY_OF,
    SMALL,
    WIDE_FLOATS,
    WIDE_INTS,
    array_to_tensor,
    copy_tensor,
    describe,
    describe_all,
    import_to_keep,
    is_home,
    jax_dtype,
    narrow,
    resolve,
    traced_device,
    view_of,
    x64_enabled,
)
from interop._log import tell
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._side import Leaf, Leaves

_config: Any = jax.config
_from_capsule, _capsule_of, _device_of = torch_private.from_capsule, jax_private.capsule_of, jax_private.device_of
_asarray: Any = np.asarray
_from_numpy = torch.from_numpy


_T = TypeVar("_T")


class Modes(Protocol):
    """What a trace of a function depends on beside arguments and torch's own state: which of its modules train."""

    def now(self) -> Hashable:
        """As it is."""
        ...

    def tensors(self) -> list[torch.Tensor]:
        """What it reads beside its arguments, and may write to."""
        ...

    def constants(self) -> Hashable:
        """What it reads beside arguments and tensors: what was traced is of these."""
        ...

    def put_back(self) -> Any:
        """A context of a trace, after which modules hold what they held: what it has assigned has no values."""
        ...

    def under(self, modes: Any) -> Any:
        """A context in which the function runs as it was when these were."""
        ...


class Surroundings(NamedTuple):
    """What a trace depends on beside its arguments."""

    x64: bool
    state: TorchState
    modes: Hashable


@dataclass(eq=False, repr=False)
class TorchFlat(Flat):
    """A flat torch function.

    Attributes:
        modes: what else a trace depends on, as it is now: whether modules train.
        key: the index of the leaf that torch's generator is seeded from, if there is one.
        origin: of a function over a batch, the function of one example: they share the structure of their outputs.
        batch: of the same, the function that it is a batch of (which may be one too), and the axes of its operands.
        known: of a derived function, its outputs, which follow from those of the function it is derived from.
        exact: of a derivative along tangents, the same in a form that can be differentiated again.
        traced: what was about when a trace met it.
        order: how many times it has been derived. From the second on it is taken apart: in torch the second derivatives
            of some fused kernels are wrong (norms, `weight_norm`), and what is wrong raises nothing.
        graph: of a captured function, what it runs.
    """

    modes: Modes | None = None
    key: int | None = None
    origin: TorchFlat | None = None
    batch: tuple[TorchFlat, Axes] | None = None
    known: Callable[[Sequence[Aval]], Outputs] | None = None
    exact: TorchFlat | None = None
    traced: Surroundings | None = None
    order: int = 0
    graph: Graph | None = None

    def here(self) -> Self:
        """The function as it is traced now: JAX caches by it, and what it is depends on more than its arguments."""
        now = Surroundings(x64_enabled(), TorchState.now(), self.modes.now() if self.modes else None)
        return self.memo(now, lambda: replace(self, traced=now, memos={}, lock=threading.RLock()))

    @property
    def to_differentiate(self) -> FlatFn:
        """The function as autograd is to record it."""
        return composite(self.fn) if self.order else followed(self)

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals, in the dtypes that JAX keeps."""
        return self.memo_of_now(("outputs", avals, x64_enabled()), lambda: self._outputs(avals))

    def memo_of_now(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What was made for this key, or is made again, where what the function reads has changed since."""
        if self.modes is None:
            return self.memo(key, make)
        now = self.modes.constants()
        found: tuple[Hashable, _T] | None = self.memos.get(key)
        if found is None or _is_old(found, now):
            with self.lock:
                found = self.memos.get(key)
                if found is None or _is_old(found, now):
                    made = make()  # which may itself have changed what the function reads: a list of its calls, say
                    found = self.memos[key] = self.modes.constants(), made
        return found[1]

    def refuse_graphless(self, inputs: Sequence[Any], active: Mask, asked: Sequence[bool]) -> None:
        """Raise where a derivative is asked of an output that autograd has lost: a gradient taken without its graph.

        `active` is over the inputs, which are leaves, or their types. `asked` is over the inexact outputs: those that
        autograd does not follow, and whose derivative counts. Of a constant, and of what is detached, it is zero.
        """
        if self.order or not any(asked):
            return
        followed = self._followed_with_graphs(tuple(map(aval_of, inputs)), active)
        if any(a and f for a, f in zip(asked, followed, strict=False)):
            raise NotDifferentiableError(
                "its result is a gradient that was taken without a graph, and has no derivative",
                hint="Take it by torch.autograd.grad(..., create_graph=True)",
            ).of(self.name)

    def _followed_with_graphs(self, avals: tuple[Aval, ...], active: Mask) -> Mask:
        if self.batch:
            example, in_axes = self.batch
            return example._followed_with_graphs(tuple(map(_without_axis, avals, in_axes)), active)
        return self.memo_of_now(("followed", avals, active), lambda: infer_followed(self, avals, active))

    def put_back(self) -> contextlib.AbstractContextManager[Any]:
        """Undoes what a trace of the function assigns to modules."""
        return self.modes.put_back() if self.modes else contextlib.nullcontext()

    def _outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        promised: Callable[[Sequence[Aval]], Outputs] | None = self.known or self.levels.example_output
        if promised:
            found = promised(avals)
        else:
            tell(self.name, "traced for %s", lambda: describe_all(avals))
            found = infer_torch(self, avals)
        kept: list[Aval] = []
        for index, aval in enumerate(found.avals):
            try:
                kept.append(Aval(aval.shape, _kept(aval)))
            except InteropError as error:
                raise in_result(error, found.structure, index)  # noqa: B904 - the same error, located
        return replace(found, avals=tuple(kept), random=found.random and self.key is None)

    def jvp(self, nonzero: Mask) -> Self:
        """The derivative along tangents, whose outputs look like the inexact ones of the function."""
        return self.memo(("jvp", nonzero), lambda: self._jvp(nonzero))

    def _jvp(self, nonzero: Mask) -> Self:
        base = self._followed()
        forward, twice = (self._again(way(base, nonzero)) for way in (jvp_by_forward_mode, jvp_by_transposes))
        in_torchs_way = self._again(jvp_by_autograd(base, nonzero, base.refuse_graphless))
        name, once = f"{self.name}.jvp", base.order == 0
        ways = (*((forward,) if once else ()), composite(forward), twice, composite(twice), in_torchs_way)
        quick = self._derived("jvp", first_that_runs(name, self.closed_over, *ways), base.order + 1)
        exact = first_that_runs(name, self.closed_over, composite(twice), twice, in_torchs_way)
        quick.exact = self._derived("jvp", exact, base.order + 2)
        quick.known = quick.exact.known = lambda avals: _some(self.outputs(tuple(avals[: len(nonzero)])), is_inexact)
        return quick

    def vjp(self, nonzero: Mask, present: Mask) -> Self:
        """The transpose, whose outputs look like the primals."""
        return self.memo(("vjp", nonzero, present), lambda: self._vjp(nonzero, present))

    def _vjp(self, nonzero: Mask, present: Mask) -> Self:
        base = self._followed()
        transpose = self._again(derive_vjp(base, nonzero, present))
        in_torchs_way = self._again(vjp_by_autograd(base, nonzero, present, base.refuse_graphless))
        ways = (*((transpose,) if base.order == 0 else ()), composite(transpose), in_torchs_way)
        vjp = self._derived("vjp", first_that_runs(f"{self.name}.vjp", self.closed_over, *ways), base.order + 1)
        vjp.known = lambda avals: replace(
            self.outputs(tuple(avals[: len(nonzero)])),
            avals=tuple(aval for aval, active in zip(avals, nonzero, strict=False) if active),
            structure=NOTHING,
        )
        return vjp

    def _followed(self) -> TorchFlat:
        base = self.exact or self
        return base if base.order else replace(base, fn=followed(base), memos={}, lock=threading.RLock())

    def closed_over(self) -> list[torch.Tensor]:
        """The tensors that it reads and is not given."""
        return self.modes.tensors() if self.modes else []

    def _again(self, fn: FlatFn) -> FlatFn:
        return again(self.name, fn, self.closed_over, keyed=self.key is not None)

    def vmap(self, in_axes: Axes) -> Self:
        """The function over a batch: by `torch.func.vmap`, or by a loop where asked for, or torch has no rule."""
        return self.memo(("vmap", in_axes), lambda: self._vmap(in_axes))

    def _vmap(self, in_axes: Axes) -> Self:
        # Each example draws numbers of its own, unless they come from a key that all of them share.
        randomness = "different" if self.key is None else "same"
        by_rule = self._as_promised(derive_vmap(self, in_axes, vmap_with(randomness)), in_axes)
        ways = (loop(self, in_axes),) if self.levels.vmap == "sequential" else (
            by_rule, composite(by_rule, values=True), loop(self, in_axes)
        )  # fmt: skip
        batched = self._derived("vmap", first_that_runs(f"{self.name}.vmap", self.closed_over, *ways), self.order)
        batched.origin, batched.batch = self.origin or self, (self, in_axes)
        batched.exact = self.exact and self.exact.vmap(in_axes)
        batched.known = lambda avals: _batched(self, avals, in_axes)
        return batched

    def _as_promised(self, by_rule: FlatFn, in_axes: Axes) -> FlatFn:
        """A batch whose results are what a trace has promised: below `vmap`, torch's autocast does not cast."""

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            outs, structure = by_rule(*leaves)
            example = tuple(_without_axis(aval_of(x), axis) for x, axis in zip(leaves, in_axes, strict=True))
            inferred = self.memo_of_now(("inferred", example, x64_enabled()), lambda: self._inferred(example))
            for out, aval in zip(outs, inferred, strict=False):
                if out.shape[1:] != aval.shape or (is_inexact(aval) and NUMPY_OF[out.dtype] != aval.dtype):
                    raise TypeError(f"a batch of {describe(out)} where one example is {describe(aval)}")
            return outs, structure

        return fn

    def _inferred(self, avals: tuple[Aval, ...]) -> tuple[Aval, ...]:
        """The avals of the outputs; none where they can't be inferred."""
        try:
            return self.outputs(avals).avals
        except Exception:  # noqa: BLE001 - it has run on values: what is wrong without them is no error of this call
            return ()

    def _derived(self, kind: str, fn: FlatFn, order: int) -> Self:
        return replace(self.derived(kind, fn), exact=None, known=None, origin=None, batch=None, order=order, graph=None)


jax_private.weak_in_caches(TorchFlat)  # else it would keep alive what nobody has any more


def _is_old(found: tuple[Hashable, Any], now: Hashable) -> bool:
    made_of, made = found
    return made_of != now or torch_private.is_stale(getattr(made, "read", ()))


def keyed(flat: TorchFlat, key: int, path: str) -> TorchFlat:
    """The function with one more leaf, of this index: the key that torch's generator is seeded from around it."""
    fn, known = flat.fn, flat.path

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        others = (*leaves[:key], *leaves[key + 1 :])
        if torch_private.is_traced(leaves[key]):  # it has no value: whoever runs what was traced seeds
            with InOrder():
                return fn(*others)
        with seeding(leaves[key]):
            return fn(*others)

    return replace(flat, fn=run, key=key, path=lambda index: path if index == key else known(index) if known else "")


def is_inexact(aval: Any) -> bool:
    """Whether a leaf of this aval has a derivative."""
    return bool(jax.dtypes.issubdtype(aval.dtype, np.inexact))


def _some(outputs: Outputs, chosen: Callable[[Aval], bool]) -> Outputs:
    return replace(outputs, avals=tuple(filter(chosen, outputs.avals)), structure=NOTHING)


def _batched(flat: TorchFlat, avals: Sequence[Aval], in_axes: Axes) -> Outputs:
    """The outputs over a batch, from those of one example."""
    pairs = list(zip(avals, in_axes, strict=True))
    size = next(aval.shape[axis] for aval, axis in pairs if axis is not None)
    outputs = flat.outputs(tuple(_without_axis(aval, axis) for aval, axis in pairs))
    return replace(outputs, avals=tuple(Aval((size, *aval.shape), aval.dtype) for aval in outputs.avals))


def _without_axis(aval: Aval, axis: int | None) -> Aval:
    return Aval(tuple(n for i, n in enumerate(aval.shape) if i != axis), aval.dtype)


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


# --- eager ------------------------------------------------------------------------------------------------------------


def run(flat: Flat, arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], Static]:
    """Run it on the values of arrays. It works on its own copy of them, and its results are copied out of it."""
    tensors, home = own(arrays)
    outs, structure = flat.fn(*tensors)
    if flat.levels.example_output is not None:
        promised = flat.levels.example_output(tuple(map(_aval, arrays)))
        check_promise(narrowed(outs, promised.avals), promised.avals, flat.name)
        check_structure(structure, promised.structure, flat.name)
    results = results_to_arrays(outs, structure)
    check_finite(results, flat.name)
    return at_home(results, home), structure


def check_finite(results: Sequence[jax.Array], name: str) -> None:
    """Raise for what `jax.debug_nans` and `jax.debug_infs` look for, as JAX does after each operation of its own."""
    if not (_config.jax_debug_nans or _config.jax_debug_infs):
        return
    checks = [(_config.jax_debug_nans, np.isnan, "nan"), (_config.jax_debug_infs, np.isinf, "inf")]
    for values in (np.asarray(result) for result in results if is_inexact(result)):
        for asked, found, what in checks:
            if asked and found(values).any():
                raise FloatingPointError(f"invalid value ({what}) encountered in {name}")


def own(arrays: Sequence[jax.Array]) -> tuple[list[torch.Tensor], Any]:
    """Tensors with the values of arrays, in memory that nobody else has: the function may write to it, and keep it.

    Also where its results belong, if that is not where results are made.
    """
    try:
        tensors = [
            _from_numpy(view.copy()) if (view := _asarray(a)).nbytes < SMALL else _from_capsule(_capsule_of(a)).clone()
            for a in arrays
            if _device_of(a) in AT_HOME
        ]
        if len(tensors) == len(arrays):
            return tensors, None
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        pass  # a Python number, or an array to refuse
    return [t.clone() for t in tensors_of(arrays)], home_of(arrays)


def at_home(results: list[jax.Array], home: Any) -> list[jax.Array]:
    """The results where they belong."""
    return results if home is None else [jax.device_put(result, home) for result in results]


def home_of(arrays: Sequence[Any]) -> Any:
    """Where results of these arguments belong: on the mesh of one that is on several devices, or on their device.

    As in JAX, that of an array that was put there comes first.
    """
    given = sorted((a for a in arrays if isinstance(a, jax.Array)), key=lambda a: not a.committed)
    shardings = [a.sharding for a in given]
    for sharding in shardings:
        if len(sharding.device_set) > 1:
            mesh = getattr(sharding, "mesh", None)
            return None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    device = next((device for sharding in shardings for device in sharding.device_set), None)
    return None if device is None or is_home(device) else device


def tensors_of(arrays: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors over the memory of arrays, gathered if they are on several devices; raises for one that can't cross.

    As in JAX, an array that was put nowhere goes where another was.
    """
    if any(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in arrays):
        warn_gathered()
    tensors: list[torch.Tensor] = []
    for index, array in enumerate(arrays):
        try:
            tensors.append(array_to_tensor(array))
        except InteropError as error:
            raise error.at(index)  # noqa: B904 - the same error, located
    if len({t.device for t in tensors}) > 1:
        tensors = _together(tensors, arrays)
    return tensors


def _together(tensors: Sequence[torch.Tensor], arrays: Sequence[Any]) -> list[torch.Tensor]:
    """On one device."""
    places = {
        t.device: i for i, (t, a) in enumerate(zip(tensors, arrays, strict=True)) if getattr(a, "committed", False)
    }
    if len(places) > 1:
        where = " and ".join(map(str, places))
        raise DeviceError(f"arrays on {where} together", hint="Move them to one device").at(max(places.values()))
    (place,) = places or (traced_device(),)
    return [t.to(place) for t in tensors]


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
    arrays: list[jax.Array] = []
    try:
        for out in outs:
            arrays.append(result_to_array(out))  # noqa: PERF401 - how many there are is for the message
    except InteropError as error:
        raise in_result(error, structure, len(arrays))  # noqa: B904 - the same error, located
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
    if t.dtype in WIDE_INTS and not x64:
        t = narrow(t)
    return import_to_keep(t.clone(memory_format=torch.contiguous_format))


def _aval(array: Any) -> Aval:
    return Aval(tuple(array.shape), np.dtype(array.dtype))
