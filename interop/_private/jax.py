"""JAX interfaces that are not public, each with its public fallback. Checked on jax 0.10.2, 0.11.2 and 0.12.0."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core

from interop._private import PUBLIC_ONLY

_jax: Any = None
_core: Any = None
_xla_bridge: Any = None
_checkify: Any = None
_lax: Any = None
_effects: Any = None
_tree_util: Any = None
_util: Any = None
Primitive: Any = None
if not PUBLIC_ONLY:
    try:
        from jax._src import checkify as _checkify
        from jax._src import core as _core
        from jax._src import effects as _effects
        from jax._src import tree_util as _tree_util
        from jax._src import util as _util
        from jax._src import xla_bridge as _xla_bridge
        from jax._src.core import Primitive
        from jax._src.lax import lax as _lax
        from jaxlib import _jax  # type: ignore[no-redef]  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:  # a jax that moved them: every fallback below is public
        _jax = _checkify = _core = _xla_bridge = _lax = _effects = _tree_util = _util = None


# The type of an array that is there; the fallback matches nothing, and every call takes the general path.
ArrayImpl: Any = getattr(_jax, "ArrayImpl", None)

# A capsule as an array over the same memory: 4 us, against 50 us through the public protocol. None where it is missing.
import_capsule: Any = getattr(_jax, "dlpack_managed_tensor_to_buffer", None)


def ready_stream(device: Any) -> int:
    """The address of a stream of a GPU by which JAX learns that others have written a value; where capsules come in."""
    address: int = device.get_stream_for_external_ready_events()
    return address


# The device of an array on one; of any other, and without the private names, it raises `AttributeError`.
device_of: Callable[[Any], Any] = operator.attrgetter("nowhere" if PUBLIC_ONLY else "_sharding._device")


def _public_capsule(array: jax.Array, stream: int | None = None) -> Any:
    shared: Any = array  # as it is declared, it knows no stream
    return shared.__dlpack__(stream=stream)


# The DLPack capsule of an array, waiting until its value is there (on a GPU it is the stream that waits, if one is
# given): 0.4 us, against 3.6 us of `__dlpack__`.
capsule_of: Callable[..., Any] = getattr(_jax, "buffer_to_dlpack_managed_tensor", None) or _public_capsule


@functools.lru_cache(maxsize=1024)
def _placed(shape: tuple[int, ...], dtype: Any, device: Any) -> tuple[Any, Any, list[Any]]:
    return jax.core.ShapedArray(shape, dtype), jax.sharding.SingleDeviceSharding(device), [device]


_put: Any = getattr(_jax, "batched_device_put", None)
_during_call: Any = getattr(getattr(_jax, "HostBufferSemantics", None), "IMMUTABLE_ONLY_DURING_CALL", None)


def _private_copy(view: Any, device: Any) -> jax.Array:
    aval, sharding, devices = _placed(view.shape, view.dtype, device)
    array: jax.Array = _put(aval, sharding, [view], devices, False, False, _during_call)
    return array


def _public_copy(view: Any, device: Any) -> jax.Array:
    return jax.device_put(view.copy(), device)


# The values of a numpy array, copied before this returns: 3 us less than by DLPack of a clone.
copy_of: Callable[[Any, Any], jax.Array] = _private_copy if _put and _during_call else _public_copy


def weak_in_caches(kind: type) -> None:
    """Let what JAX caches of equations hold parameters of this type weakly; without the name, the last 2048 stay."""
    types: set[type] | None = getattr(_util, "weakref_cache_key_types", None)
    if types is not None:
        types.add(kind)


def backend_runs() -> bool:
    """Whether some JAX backend has been started in this process, by anyone; the fallback assumes the worst."""
    return bool(_xla_bridge.backends_are_initialized()) if _xla_bridge else True


def weaken(x: jax.Array) -> jax.Array:
    """The value with JAX's weak type, as a Python number has it. Without the private name it stays strongly typed."""
    weak: jax.Array = _lax._convert_element_type(x, weak_type=True) if _lax else x
    return weak


def manual_axes(x: Any) -> frozenset[Any]:
    """The mesh axes of `shard_map` that the value varies over; none without the private type."""
    matter = getattr(jax.typeof(x), "mat", None)
    return frozenset(getattr(matter, "varying", ()))


def vary(leaves: list[Any]) -> list[Any]:
    """The same values, all varying over the union of their manual axes, as a primitive over several of them needs."""
    axes: frozenset[Any] = frozenset().union(*map(manual_axes, leaves)) if leaves else frozenset()
    if not axes:
        return leaves
    return [jax.lax.pcast(x, tuple(sorted(axes - manual_axes(x))), to="varying") if axes - manual_axes(x) else x
            for x in leaves]  # fmt: skip


def shaped_array(shape: tuple[int, ...], dtype: Any, like: tuple[Any, ...]) -> Any:
    """An output aval that varies over the manual axes of the inputs: else gradients through shard_map are wrong."""
    matter = next((m for m in (getattr(a, "mat", None) for a in like) if getattr(m, "varying", ())), None)
    if matter is None:
        return jax.core.ShapedArray(shape, dtype)
    sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=matter)


def device_count(lowering: Any) -> int:
    """The number of devices that a program outside `shard_map` is lowered for; 1 inside, or where it is not known."""
    context = getattr(lowering.module_context, "axis_context", None)
    if getattr(context, "manual_axes", None):
        return 1
    return int(getattr(context, "num_devices", None) or 1)


def _public(name: str) -> Any:
    return getattr(importlib.import_module("jax.extend.core"), name)  # it costs 17 ms of import


Effect: Any = getattr(_effects, "Effect", None) or _public("Effect")


def allow_effect(kind: type) -> None:
    """Let programs with this effect be compiled, and run in loops. Without the private tables, JAX refuses them."""
    if _effects:
        _effects.lowerable_effects.add_type(kind)
        _effects.control_flow_allowed_effects.add_type(kind)


def is_exported(lowering: Any) -> bool:
    """Whether a program is lowered for `jax.export`; where it is not known, JAX refuses it in words of its own."""
    return bool(getattr(getattr(lowering.module_context, "lowering_parameters", None), "for_export", False))


def _public_is_tracing() -> bool:
    return isinstance(jax.lax.full((), 0), jax.core.Tracer)


_contexts: Any = getattr(_core, "trace_ctx", None)
_of_values: Any = getattr(_core, "eval_trace", None)


def _private_is_tracing() -> bool:
    return _contexts.trace is not _of_values


# Whether an operation on values would be recorded: 0.1 us.
is_tracing: Callable[[], bool] = _private_is_tracing if _contexts and _of_values else _public_is_tracing


def eager_primitive(name: str) -> Any:
    """A primitive with several results."""
    primitive = (Primitive or _public("Primitive"))(name)
    primitive.multiple_results = True
    return primitive


def look_for_nan(primitive: Any) -> None:
    """Let `checkify` find what is not a number in its results; without the private names it does not look."""
    rules: Any = getattr(_checkify, "error_checks", {})
    check: Any = getattr(_checkify, "nan_error_check", None)
    if check:
        rules[primitive] = functools.partial(check, primitive)


# --- programs ---------------------------------------------------------------------------------------------------------

# Equations that call another program, of the same inputs and outputs.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "remat2",
    "checkpoint",
)


def inner_program(primitive: Any, params: dict[str, Any]) -> Any:
    """The jaxpr that an equation calls; None for an operation."""
    if primitive.name not in _CALLS:
        return None
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    return getattr(inner, "jaxpr", inner)


def inlined(program: Any, arguments: Sequence[Any], effectful: Callable[..., Any] | None = None) -> list[Any]:
    """The outputs of a closed jaxpr, operation by operation; functions that were jitted inside are opened.

    An equation with an effect is given to `effectful`, with the function that evaluates it.
    """
    if PUBLIC_ONLY and effectful is None:
        outs: list[Any] = jax.core.eval_jaxpr(program.jaxpr, program.consts, *arguments)
        return outs
    return _run(program.jaxpr, program.consts, arguments, effectful)


def _run(program: Any, constants: Sequence[Any], arguments: Sequence[Any], effectful: Any) -> list[Any]:
    values: dict[Any, Any] = dict(zip((*program.constvars, *program.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    def evaluate(equation: Any) -> Any:
        with equation.ctx.manager:
            params = equation.primitive.get_bind_params(equation.params)
            outs = equation.primitive.bind(*map(read, equation.invars), **params)
        return outs if equation.primitive.multiple_results else [outs]

    for equation in program.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            outs = _run(inner.jaxpr, inner.consts, list(map(read, equation.invars)), effectful)
        elif effectful is not None and equation.effects & program.effects:
            outs = effectful(equation, evaluate)
        else:
            outs = evaluate(equation)
        values.update(zip(equation.outvars, outs, strict=True))
    return list(map(read, program.outvars))


def inner_programs(equation: Any) -> list[Any]:
    """The jaxprs in the parameters of an equation: of a loop, a branch, a rematerialised function."""
    every = [x for p in equation.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    return [x for x in every if hasattr(x, "eqns")]


def silenced(equation: Any) -> Any:
    """A loop or a branch without those of its effects that answer nothing; None if one answers."""
    params: dict[str, Any] = {}
    for name, value in equation.params.items():
        if isinstance(value, tuple) and any(hasattr(x, "eqns") for x in value):
            params[name] = tuple(map(_silenced_program, value))
        else:
            params[name] = _silenced_program(value) if hasattr(value, "eqns") else value
        if params[name] is None is not value or (isinstance(params[name], tuple) and None in params[name]):
            return None
    return equation.replace(params=params, effects=frozenset())


def _silenced_program(program: Any) -> Any:
    """The same of a jaxpr, closed or open."""
    if getattr(program, "jaxpr", program) is not program:  # from jax 0.12 on, an open one has itself there
        inner = _silenced_program(program.jaxpr)
        return None if inner is None else program.replace(jaxpr=inner)
    equations: list[Any] = []
    for equation in program.eqns:
        if not equation.effects & program.effects:
            equations.append(equation)
        elif inner_programs(equation):
            equations.append(silenced(equation))
        elif equation.outvars:
            return None
    return None if None in equations else program.replace(eqns=equations, effects=frozenset())


def is_linear_in_cotangents(program: Any) -> bool:
    """Whether the pull-back is JAX's own all through, and in no less than 32 bits."""
    for equation in program.eqns:
        if "vjp" in equation.primitive.name or any(_is_narrow(v.aval) for v in equation.outvars):
            return False
        if not all(is_linear_in_cotangents(getattr(p, "jaxpr", p)) for p in inner_programs(equation)):
            return False
    return True


def _is_narrow(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.numpy.inexact) and dtype.itemsize < 4


def dependences(program: Any) -> list[int]:
    """For each output of a jaxpr the inputs that it depends on, as a set of bits."""
    bits: dict[Any, int] = {v: 1 << i for i, v in enumerate(program.invars)}

    def read(atom: Any) -> int:
        return 0 if hasattr(atom, "val") else bits.get(atom, 0)

    for equation in program.eqns:
        operands = list(map(read, equation.invars))
        inner = inner_program(equation.primitive, equation.params)
        if inner is None or len(inner.invars) != len(operands):
            every = functools.reduce(operator.or_, operands, 0)
            bits.update(dict.fromkeys(equation.outvars, every))
            continue
        for variable, depends in zip(equation.outvars, dependences(inner), strict=True):
            bits[variable] = functools.reduce(operator.or_, (o for i, o in enumerate(operands) if depends >> i & 1), 0)
    return list(map(read, program.outvars))


def stopped(program: Any) -> tuple[bool, ...]:
    """Which outputs of a jaxpr are given by `jax.lax.stop_gradient`."""
    given = {id(v) for equation in program.eqns if equation.primitive.name == "stop_gradient" for v in equation.outvars}
    return tuple(id(v) in given for v in program.outvars)


# --- containers -------------------------------------------------------------------------------------------------------

_nodes: dict[type, Any] = getattr(_tree_util, "_registry", {})


def pytree_functions(t: type) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """What a type was registered with: opens an object, builds one of children and static; None where nobody knows."""
    node = _nodes.get(t)
    return None if node is None else (node.to_iter, _children_first(node.from_iter))


@functools.lru_cache(maxsize=1024)
def _children_first(build: Callable[..., Any]) -> Callable[..., Any]:
    return lambda children, static: build(static, children)


# --- what is there ----------------------------------------------------------------------------------------------------


def fast_paths() -> dict[str, bool]:
    """What private names are used for, and whether they are there; where not, the public way is taken."""
    return {
        "arrays from capsules": import_capsule is not None,
        "capsules of arrays": capsule_of is not _public_capsule,
        "copies of numpy arrays": copy_of is _private_copy,
        "the type of arrays": ArrayImpl is not None,
        "weak types of numbers": _lax is not None,
        "effects in compiled loops": _effects is not None,
        "whether a trace is made": is_tracing is _private_is_tracing,
        "caches that hold weakly": hasattr(_util, "weakref_cache_key_types"),
        "pytrees inside torch.compile": bool(_nodes),
        "whether a backend runs": _xla_bridge is not None,
    }
