"""Torch interfaces that are not public, each with its public fallback. Checked on torch 2.13.0."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import types
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.utils.dlpack

from interop._private import PUBLIC_ONLY

_torch: Any = torch
_C: Any = None if PUBLIC_ONLY else torch._C

# --- memory -----------------------------------------------------------------------------------------------------------

# The DLPack capsule of a tensor. It takes conjugated, negated and differentiable tensors without complaint: `_leaf`
# resolves them first. 0.5 us, against 3 us of the method.
capsule_of: Callable[[torch.Tensor], Any] = getattr(_C, "_to_dlpack", None) or (lambda t: t.detach().__dlpack__())

# A tensor over the memory of a capsule.
from_capsule: Callable[[Any], torch.Tensor] = getattr(_C, "_from_dlpack", None) or torch.utils.dlpack.from_dlpack


class Lent:
    """A CPU tensor as `numpy.from_dlpack` takes it."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:  # by name: a dictionary for them would cost 0.15 us
        del stream, max_version, dl_device, copy
        return capsule_of(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # a CPU


_stream_address: Any = getattr(_C, "_cuda_getCurrentRawStream", None)  # builds for the CPU have none

# The address of the current stream of a GPU, 0 for the default one: 0.2 us, against 12 us of the public way.
current_stream: Callable[[int], int] = _stream_address or (lambda i: torch.cuda.current_stream(i).cuda_stream)


# --- what is going on in this thread ----------------------------------------------------------------------------------

_always: Callable[[], bool] = lambda: True  # noqa: E731 - without the names, every call takes the general path
functorch_active: Callable[[], bool] = getattr(_C, "_are_functorch_transforms_active", None) or _always
dispatch_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", None) or _always

# Whether autocast is on, of any device.
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", None) or _always

# What `torch.no_grad` and its kin call, as a function mode sees it. Without it forward mode is torch's own, which does
# not know them.
set_grad_enabled: Any = getattr(_C, "_set_grad_enabled", None)

# The number of function modes in this thread; a default device is one.
function_modes: Callable[[], int] = getattr(_C, "_len_torch_function_stack", None) or _always


# The fused weight normalisation of `torch.nn.utils`; None where it has another name.
weight_norm: Any = getattr(torch, "_weight_norm", None)


def without_overrides(fn: Any) -> Callable[..., Any]:
    """A function of torch's own, written in Python, that does not ask whether a mode wants to run in its stead."""
    names = {name: lambda *_: False for name in fn.__globals__ if name.startswith("has_torch_function")}
    return types.FunctionType(fn.__code__, fn.__globals__ | names, fn.__name__, fn.__defaults__, fn.__closure__)


# --- abstract evaluation ----------------------------------------------------------------------------------------------

from torch._subclasses.fake_tensor import (  # noqa: E402 - grouped with its use; no public name exists
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor  # noqa: E402
from torch.utils import _python_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

# What torch raises for a function that needs the values of fake tensors.
_NEEDS_VALUES: tuple[type[BaseException], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
_SAYS_SO = (
    "FakeTensor",
    "fake impl",
    "fake tensor",
    "doesn't have storage",
    "data pointer",
    "data is not allocated yet",
    "is not supported for tensor subclasses",
    "meta tensor",
    "data-dependent",
)


def needs_values(error: BaseException) -> bool:
    """Whether a function failed on fake tensors for the want of their values; any other error is its own."""
    said = type(error).__module__.startswith("torch.") or type(error) in (RuntimeError, TypeError, NotImplementedError)
    return isinstance(error, _NEEDS_VALUES) or (said and any(words in str(error) for words in _SAYS_SO))


def fake_mode() -> Any:
    """A mode in which tensors have shapes and no values, and may meet real ones from closures."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    converter = getattr(mode, "fake_tensor_converter", None)
    if converter is not None:
        # It remembers results by weak references, which keep `Module.to` from working on a module that is made inside.
        converter.set_tensor_memo = _remember_nothing
    return mode


def _remember_nothing(_meta: torch.Tensor, _fake: torch.Tensor) -> None:
    pass


_REAL = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_without_modes: Any = contextlib.nullcontext if PUBLIC_ONLY else _python_dispatch._disable_current_modes


class NeedsFakes(Exception):
    """A trace can't go on with the values of constants."""


Decide: TypeAlias = "Callable[[Callable[[], torch.Tensor], bool | None], bool | None]"


class _Constants:
    """The traced tensors that are made of constants alone, with what makes their values.

    None is, once one has been written to: who shares its memory, nobody knows.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, Callable[[], Any]]] = {}
        self.are_known = True
        self.read: dict[int, Read] = {}

    def add(self, result: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember how a result is made, if it is one."""
        every = (*args, *kwargs.values())
        if func._schema.is_mutable and any(isinstance(x, torch.Tensor | list) and self._has(x) for x in every):
            self.are_known = False
        if draws(func, args, kwargs) or not self._has(every):
            return

        @functools.cache
        def make() -> Any:
            with torch.no_grad():
                return func(*self._value(args), **{name: self._value(x) for name, x in kwargs.items()})

        if isinstance(result, FakeTensor):
            self.made[id(result)] = result, make
        elif isinstance(result, tuple | list):
            for index, item in enumerate(result):
                self.made[id(item)] = item, lambda index=index: make()[index]  # type: ignore[misc]

    def truth(self, func: Any, args: Any) -> bool | None:
        """The Python bool that an operation makes of them; None of others."""
        if PUBLIC_ONLY or not self._has(args):
            return None
        with _without_modes():
            return bool(func(*self._value(args)))

    def _has(self, x: Any) -> bool:
        if isinstance(x, tuple | list):
            return all(map(self._has, x))
        return not isinstance(x, torch.Tensor) or (self.are_known and (type(x) in _REAL or id(x) in self.made))

    def _value(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return [*map(self._value, x)]
        if type(x) in _REAL:
            self.read[id(x)] = weakref.ref(x), version_of(x)
        return self.made[id(x)][1]() if isinstance(x, FakeTensor) else x


Read: TypeAlias = "tuple[weakref.ref[torch.Tensor], int]"  # a tensor whose value a trace has asked, and its version


def is_stale(reads: Sequence[Read]) -> bool:
    """Whether one of these tensors has been written to since."""
    return any((t := ref()) is not None and version_of(t) != version for ref, version in reads)


class TraceWatch(TorchDispatchMode):
    """Sees whether any operation under it draws from torch's generator, and undoes what a trace writes to real tensors.

    Whether a tensor without a value is true, `decide` says, or None if it does not know. It can ask for that tensor,
    and is told whether it is true now, where it is made of constants alone. `shapes` has operations of which torch does
    not say what they return.

    With `fakes`, this mode is not on, and what is made of nothing that is traced, nor of parameters, has its values:
    the function may keep it. What draws, or writes traced values to such a tensor, raises `NeedsFakes`.
    """

    def __init__(
        self,
        decide: Decide | None = None,
        shapes: Mapping[Any, Callable[..., Any]] = types.MappingProxyType({}),
        *,
        fakes: Any = None,
    ) -> None:
        super().__init__()
        self.draws = False
        self.fakes = fakes
        self.needs_fakes = False
        self.decide = decide
        self.shapes = shapes
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.constants = _Constants()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.shapes[func](*args, **(kwargs or {})) if func in self.shapes else NotImplemented
        if result is not NotImplemented:
            return result
        is_traced_too = any(issubclass(t, FakeTensor) for t in types)
        if self.decide and _asks_for_truth(func, args) and (is_traced_too or not self.fakes):
            answer = self.decide(functools.partial(_condition, func, args), self.constants.truth(func, args))
            if answer is not None:
                return answer
        if draws(func, args, kwargs or {}):
            self.draws = True
            self._need_fakes(not is_traced_too)
        if func._schema.is_mutable:
            for t in (*args, *(kwargs or {}).values()):
                if type(t) in _REAL and id(t) not in self.written:
                    self._need_fakes(is_traced_too)
                    with _without_modes():
                        self.written[id(t)] = t, t.detach().clone()
        in_fakes = self.fakes and not is_traced_too and any(map(_requires_grad, args))
        with self.fakes if in_fakes else contextlib.nullcontext():
            result = func(*args, **(kwargs or {}))
        if self.decide:
            self.constants.add(result, func, args, kwargs or {})
        return result

    def _need_fakes(self, is_needed: bool) -> None:
        if self.fakes and is_needed:
            self.needs_fakes = True
            raise NeedsFakes

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        with _without_modes():
            for t, value in self.written.values():
                t.data.copy_(value)


def _requires_grad(x: Any) -> bool:
    return (
        any(map(_requires_grad, x)) if isinstance(x, list | tuple) else isinstance(x, torch.Tensor) and x.requires_grad
    )


_ATEN = torch.ops.aten


def _asks_for_truth(func: Any, args: Any) -> bool:
    """Whether an operation makes a Python bool."""
    return func is _ATEN.equal.default or (func is _ATEN._local_scalar_dense.default and args[0].dtype is torch.bool)


def _condition(func: Any, args: Any) -> torch.Tensor:
    """The same as a tensor."""
    if func is not _ATEN.equal.default:
        condition: torch.Tensor = args[0]
        return condition
    return (args[0] == args[1]).all() if args[0].shape == args[1].shape else torch.zeros((), dtype=torch.bool)


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of an operation draws from torch's generator."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and not _drops_nothing(func, args, kwargs)


def _drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is a dropout, or an attention with one, of probability zero or outside training."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    given = {a.name: a.default_value for a in func._schema.arguments if a.name not in given} | given
    off = [given[name] == 0 for name in ("p", "dropout_p", "dropout") if name in given]
    return any(off) or given.get("train") is False


# --- autograd ---------------------------------------------------------------------------------------------------------

_top_hooks = getattr(getattr(_C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
_keep_graph = getattr(getattr(_C, "_autograd", None), "_get_current_graph_task_keep_graph", None)


def saved_tensors_are_watched() -> bool:
    """Whether hooks want to see what is saved for backward; the fallback shows them everything."""
    return _top_hooks(False) is not None if _top_hooks and _keep_graph else True


def keeps_graph() -> bool:
    """Whether the running backward was asked to retain the graph."""
    return bool(_keep_graph()) if _keep_graph else True


_running_graph = getattr(_C, "_current_graph_task_id", None)


def is_in_backward() -> bool:
    """Whether this thread walks a graph: what runs then is a recomputation, or a rule."""
    return _running_graph is not None and _running_graph() != -1


_hooks: Any = getattr(_C, "_autograd", None)


@contextlib.contextmanager
def everything_is_saved() -> Generator[None]:
    """Hooks on saved tensors do nothing in this thread: what backward needs is kept.

    A checkpoint, which is made of such hooks, would run the function again in backward: with other parameters than it
    was given, if those were swapped into a module, and not at all below `torch.func`, which forbids hooks.
    """
    if not hasattr(_hooks, "_saved_tensors_hooks_set_tracing"):
        yield
        return
    forbidden = _hooks._saved_tensors_hooks_get_disabled_error_message()
    before = _hooks._saved_tensors_hooks_set_tracing(True)
    if forbidden is not None:
        _hooks._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        _hooks._saved_tensors_hooks_set_tracing(before)
        if forbidden is not None:
            _hooks._saved_tensors_hooks_disable(forbidden)


_functorch: Any = getattr(_C, "_functorch", None)


# A context in which an op runs below autograd; None where it is missing.
below_autograd: Any = getattr(_C, "_AutoDispatchBelowAutograd", None)


def own_leaf(t: torch.Tensor) -> torch.Tensor:
    """The tensor as a leaf of autograd that is ours: what is computed from it loses nobody's gradient."""
    leaf: Any = t.requires_grad_()
    leaf._is_of_interop = True
    return leaf


def is_of_the_user(t: torch.Tensor) -> bool:
    """Whether a gradient of this tensor would reach a leaf that is not ours; of what a call has kept it may not."""
    if is_dead(t) or is_traced(t):
        return False
    if t.grad_fn is None:
        return not hasattr(t, "_is_of_interop")
    waiting, seen = [t.grad_fn], set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not hasattr(node.variable, "_is_of_interop"):
            return True
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False


def version_of(t: torch.Tensor) -> int:
    """How often it was written to; an inference tensor does not say, and nobody writes to one whose transform ended."""
    return 0 if is_dead(t) or t.is_inference() else t._version


def has_tangent(xs: Sequence[torch.Tensor]) -> bool:
    """Whether one is a dual number of forward-mode AD."""
    forward_ad: Any = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in xs)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`apply` of an autograd function where no transform of `torch.func` is about, whose care costs 3 us."""
    bare: Any = None if PUBLIC_ONLY else getattr(super(torch.autograd.Function, function), "apply", None)
    return bare or function.apply


def is_fake(t: Any) -> bool:
    """Whether it is a tensor without values that torch traces with."""
    return isinstance(t, FakeTensor)


def is_traced(t: Any) -> bool:
    """Whether it stands for a tensor while torch traces a program."""
    return isinstance(t, FakeTensor | FunctionalTensor)


def forget_parametrizations(module: torch.nn.Module) -> None:
    """Take what is of a module out of the cache of `parametrize.cached()`, which serves whoever stands for it too.

    Without the name there is no way to it.
    """
    cache: dict[tuple[int, str], Any] = {} if PUBLIC_ONLY else getattr(torch.nn.utils.parametrize, "_cache", {})
    if cache:
        parts = set(map(id, module.modules()))
        for key in [key for key in cache if key[0] in parts]:
            del cache[key]


# --- Dynamo -----------------------------------------------------------------------------------------------------------


def constant_result(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run by Dynamo at trace time, its result a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but imports Dynamo to do so.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


_eval_frame: Any = getattr(getattr(_C, "_dynamo", None), "eval_frame", None)


def never_traced(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Left out of every graph by Dynamo, with all that it calls; `torch.compiler.disable` would import Dynamo."""
    marked: Any = fn
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "interop: it is called outside of what is compiled"
    if hasattr(_eval_frame, "set_code_exec_strategy"):
        skip = _eval_frame._FrameAction.SKIP
        _eval_frame.set_code_exec_strategy(marked.__code__, _eval_frame._FrameExecStrategy(skip, skip))
    return fn


def concrete(number: Any) -> Any:
    """A number that torch keeps open in a trace, fixed for that trace, with a guard of torch's own."""
    kind = type(number)
    return int(number) if kind is torch.SymInt else float(number) if kind is torch.SymFloat else number


@contextlib.contextmanager
def constants_allowed() -> Generator[None]:
    """Tensors with values may meet those without, in the tracer that is at work: they are constants of its graph."""
    mode = _C._get_dispatch_mode(_C._TorchDispatchModeKey.FAKE) if _C else None
    if mode is None:
        yield
        return
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


@functools.cache
def keep_effects(op: str) -> None:
    """Have torch's compilers keep every call of this op, in order. Without the private name they may drop some."""
    register: Any = None if PUBLIC_ONLY else getattr(torch.library, "_register_effectful_op", None)
    if register is not None:
        register(op, importlib.import_module("torch._library.effects").EffectType.ORDERED)


def is_compiled() -> bool:
    """Whether the graph that is being made belongs to compiled code, which is thrown away when its function is gone."""
    guards: Any = importlib.import_module("torch._guards")
    return guards.TracingContext.try_get() is not None


is_tracing: Callable[[], bool] = getattr(_C, "_is_tracing", None) or _torch.jit.is_tracing


# --- sizes that are open ----------------------------------------------------------------------------------------------


def symbol_of(size: Any) -> str | None:
    """The name of a size that is one symbol; None for an expression, or without the private name."""
    expression = getattr(getattr(size, "node", None), "expr", None)
    return str(expression) if type(expression).__name__ == "Symbol" else None


def expression_of(size: Any, known: Any) -> str | None:
    """A size as an expression of known symbols, in JAX's words; None where there is none."""
    return _worded(getattr(getattr(size, "node", None), "expr", None), known)


def least(size: Any) -> int:
    """The least that a size can be."""
    try:
        return int(size.node.shape_env.bound_sympy(size.node.expr).lower)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return 0


_FUNCTIONS = {"FloorDiv": "floordiv", "Mod": "mod", "PythonMod": "mod", "Max": "max", "Min": "min"}


def size_hint(size: Any) -> int | None:
    """What the size is in the call that is traced; None where nobody knows."""
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None


def same_size(one: Any, other: Any) -> None:
    """Tell torch that two sizes are one."""
    torch._check(one == other)


def _worded(expression: Any, known: Any) -> str | None:
    kind = type(expression).__name__
    if getattr(expression, "is_Integer", False):
        return str(int(expression))
    if kind == "Symbol":
        return str(expression) if str(expression) in known else None
    parts = [_worded(part, known) for part in getattr(expression, "args", ())]
    if not parts or None in parts:
        return None
    if kind == "Add":
        return " + ".join(map(str, parts))
    if kind in ("Mul", "Pow"):  # JAX's words have no parentheses
        return None if any(" + " in str(p) for p in parts) else ("*" if kind == "Mul" else "^").join(map(str, parts))
    return f"{_FUNCTIONS[kind]}({', '.join(map(str, parts))})" if kind in _FUNCTIONS else None


# --- containers -------------------------------------------------------------------------------------------------------

_pytree: Any = None if PUBLIC_ONLY else importlib.import_module("torch.utils._pytree")
_nodes: dict[type, Any] = getattr(_pytree, "SUPPORTED_NODES", {})


def pytree_functions(t: type) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """What a type was registered with: opens an object, builds one of children and static; None for any other type."""
    node = _nodes.get(t)
    return None if node is None else (node.flatten_fn, node.unflatten_fn)


# --- transforms that know no autograd function ------------------------------------------------------------------------


# The tensor itself where its transform is over, which `torch.func.vjp` leaves to its pull-back.
unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = getattr(_functorch, "unwrap_if_dead", None) or (
    lambda t: t.view_as(t)
)


def is_dead(t: torch.Tensor) -> bool:
    """Whether it was a value below a transform of `torch.func` that has ended."""
    if unwrap_if_dead(t) is not t:
        return True
    if not _functorch or not _functorch.is_batchedtensor(t):
        return False
    layer = _functorch.peek_interpreter_stack()
    return bool(layer is None or _functorch.maybe_get_level(t) > layer.level())


def is_legacy_batched(t: torch.Tensor) -> bool:
    """Whether it is a batch of the older vmap, which `is_grads_batched` uses."""
    return bool(_functorch and _functorch.is_legacy_batchedtensor(t))


def unbatch(t: torch.Tensor) -> torch.Tensor:
    """The values of a legacy batched tensor, the batch first."""
    return torch._remove_batch_dim(t, 1, 0, 0)


def batch(t: torch.Tensor) -> torch.Tensor:
    """Values as a legacy batched tensor, mapped over their first axis."""
    return torch._add_batch_dim(t, 0, 1)


def peel_vmap(leaves: Sequence[Any]) -> tuple[list[Any], tuple[int | None, ...], Any, Callable[[Any], Any]] | None:
    """Where the innermost transform is `vmap`: what the leaves hold, their batch axes, a context outside, a way back.

    None where it is another one, or without the private names: torch then asks the autograd function.
    """
    layer = _functorch.peek_interpreter_stack() if _functorch else None
    if layer is None or layer.key() != _functorch.TransformType.Vmap:
        return None
    level = layer.level()
    plain: list[Any] = []
    axes: list[int | None] = []
    for leaf in leaves:
        x = unwrap_if_dead(leaf) if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(x, torch.Tensor) and _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == level:
            plain.append(_functorch.get_unwrapped(x))
            axes.append(_functorch.maybe_get_bdim(x))
        else:
            plain.append(x)
            axes.append(None)

    def wrap(outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_functorch._add_batch_dim(out, 0, level) for out in outs]

    return plain, tuple(axes), _Outside(), wrap


class _Outside:
    """Outside the innermost transform of `torch.func`."""

    def __enter__(self) -> None:
        self.layer = _functorch.pop_dynamic_layer_stack()

    def __exit__(self, *_: object) -> None:
        _functorch.push_dynamic_layer_stack(self.layer)


@functools.cache
def teach_functionalize(function: type[torch.autograd.Function]) -> None:
    """Give `torch.func.functionalize` a rule for an autograd function that writes to nothing: torch has none for any.

    Every other function meets torch's refusal as before. Without the private table, so does this one.
    """
    if not _functorch:
        return
    apply: Any = importlib.import_module("torch._functorch.autograd_function").custom_function_call

    key = _functorch.TransformType.Functionalize
    refuse = apply.functorch_table[key]

    def rule(layer: Any, called: Any, *operands: Any) -> Any:
        if called is not function:
            return refuse(layer, called, *operands)

        def unwrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not _torch._is_functional_tensor(x):
                return x
            _torch._sync(x)
            return _functorch._unwrap_functional_tensor(x, layer.functionalize_add_back_views())

        plain = list(map(unwrapped, operands))
        with layer.lower():
            outs = apply(called, *plain)
        return tuple(_functorch._wrap_functional_tensor(out, layer.level()) for out in outs)

    apply.functorch_table[key] = rule


def register_fake(library: torch.library.Library, name: str, fn: Callable[..., Any]) -> None:
    """Register what an operation of a library does on fake tensors.

    The public function looks up its caller in the files of all modules, which is a third of what importing us costs.
    """
    qualname = f"{library.ns}::{name}"
    registry = None if PUBLIC_ONLY else getattr(torch._library, "simple_registry", None)
    if registry is None:
        torch.library.register_fake(qualname, fn, lib=library)
    else:
        handle = registry.singleton.find(qualname).fake_impl.register(fn, __name__, library)
        library._registration_handles.append(handle)


# --- capture ----------------------------------------------------------------------------------------------------------


def trace(fn: Callable[..., Any], *args: Any, watch: TraceWatch) -> torch.fx.GraphModule:
    """The operations of a function on fake tensors, free of writes but to what it closes over, by reference.

    What it asks of values, `watch` decides; it may write down a check of that.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - costs a second; only a capture pays

    module = make_fx(_watched(fn, watch), tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    if any(map(writes, module.graph.nodes)):
        again = torch.func.functionalize(_watched(module, TraceWatch()))
        with torch.no_grad():  # the gradients are in the graph already
            module = make_fx(again, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    return module


def _watched(fn: Callable[..., Any], watch: TraceWatch) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with watch:
            return fn(*args)

    return run


def writes(node: Any) -> bool:
    """Whether an operation of a graph says that it writes to an argument."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def acts(node: Any) -> bool:
    """Whether an operation of a graph counts though nobody reads what it returns: it writes, or raises."""
    schema: Any = getattr(node.target, "_schema", None)
    if not schema or node.target is _ATEN._assert_tensor_metadata.default:  # a guard of the trace
        return False
    return bool(schema.is_mutable or not schema.returns)


def checks(node: Any) -> bool:
    """Whether an operation of a graph does nothing but raise where a condition is not met."""
    schema: Any = getattr(node.target, "_schema", None)
    return acts(node) and not schema.is_mutable


class Unmet(RuntimeError):
    """A check of a captured graph has failed; its text says what the function would have raised."""


def check(condition: torch.Tensor, error: str = "Expected a condition that holds") -> None:
    """Raise unless a condition holds: in a batch, of every example. On a GPU the host waits for it."""
    while _functorch and _functorch.is_functorch_wrapped_tensor(condition):
        condition = _functorch.get_unwrapped(condition)
    if not condition.all():
        raise Unmet(error)


def is_view(node: Any) -> bool:
    """Whether what an operation of a graph returns is memory of its argument, or holds such."""
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or bool(schema and any(r.alias_info for r in schema.returns))


_fx_node: Any = importlib.import_module("torch.fx.node")
_QUICK: dict[Any, Callable[..., Any]] = {}


def quick_call(node: Any) -> Callable[..., Any]:
    """The quickest way to call the operation of a node of a traced graph with the arguments that it has there.

    A function or method of torch reads its arguments in less time than the operation itself. It will do, where a trial
    shows that it calls this very operation with these very arguments.
    """
    op: Any = node.target
    if PUBLIC_ONLY or not hasattr(op, "overloadpacket"):
        return op
    key = (op, tuple(map(_kind_of, node.args)), tuple((name, _kind_of(x)) for name, x in node.kwargs.items()))
    found = _QUICK.get(key)
    if found is None:
        name = op.overloadpacket.__name__
        places = (torch, torch.nn.functional, torch.Tensor)
        candidates = [fn for place in places if isinstance(fn := getattr(place, name, None), _BUILTIN)]
        found = _QUICK[key] = next((fn for fn in candidates if _calls(fn, node)), getattr(op, "_op", op))
    return found


_BUILTIN = types.BuiltinFunctionType | types.MethodDescriptorType


def _kind_of(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return (type(argument), *map(_kind_of, argument))
    return type(argument)


class _Called(Exception):
    pass


class _FirstCall(TorchDispatchMode):
    """Ends with the first operation that is called under it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Called(func, args, kwargs or {})


def _calls(fn: Callable[..., Any], node: Any) -> bool:
    """Whether a function calls the operation of this node, when it is given its arguments."""
    try:
        args, kwargs = _fx_node.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
    except KeyError:  # a constant
        return False
    try:
        with _FirstCall():
            fn(*args, **kwargs)
    except _Called as call:
        return call.args[0] is node.target and _is_same(call.args[1:], (args, kwargs))
    except Exception:  # noqa: BLE001 - whatever it does not take
        return False
    return False


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    return a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)


# --- what is there ----------------------------------------------------------------------------------------------------


def fast_paths() -> dict[str, bool]:
    """What private names are used for, and whether they are there; where not, the public way is taken."""
    return {
        "capsules of tensors": hasattr(_C, "_to_dlpack"),
        "tensors from capsules": hasattr(_C, "_from_dlpack"),
        "streams of a GPU": bool(_stream_address) or not (PUBLIC_ONLY or torch.cuda.is_available()),
        "which modes are on": _always not in (functorch_active, dispatch_modes, any_autocast, function_modes),
        "what is saved for a backward": bool(_top_hooks and _keep_graph),
        "hooks that are set aside": hasattr(_hooks, "_saved_tensors_hooks_set_tracing"),
        "batches that are peeled off": _functorch is not None,
        "operations below autograd": below_autograd is not None,
        "code that Dynamo leaves out": hasattr(_eval_frame, "set_code_exec_strategy"),
        "pytrees of torch": bool(_nodes),
        "operations of captured graphs": not PUBLIC_ONLY,
    }
