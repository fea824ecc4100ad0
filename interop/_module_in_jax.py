"""A torch module as a function of its parameters. Mirror of `_module_in_torch`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from interop._closed_over import constant, constants_of, find_closed_over, first, slots_of
from interop._errors import LeafError, UnsupportedError
from interop._leaf import WIDE_INTS, describe
from interop._private import torch as torch_private


class ModuleFunction:
    """`(params, *args, **kwargs)` to the module's output, with `params` as `torch.func.functional_call` takes them.

    Every call runs on a fresh skeleton: the same submodules, with tables of their own, and no copy of a parameter. The
    module is never touched, from any number of threads; the skeleton lives as long as the graph that was recorded on
    it. Buffers are copies, so that a module may write to them: what it wrote is returned beside its output if the
    function is mutable, and refused if not.
    """

    def __init__(self, module: torch.nn.Module, *, mutable: bool = False) -> None:
        self.module: torch.nn.Module = getattr(module, "_orig_mod", module)  # compiled code knows its own parameters
        refuse_module(self.module)
        self.mutable = mutable
        self.training = _Training(self.module)
        self.watched: set[bool] = set()  # whether a call was watched that trains, and one that does not
        self.__name__ = type(self.module).__name__
        self.__doc__ = self.module.__doc__

    def __call__(self, params: Mapping[str, torch.Tensor], /, *args: Any, **kwargs: Any) -> Any:
        skeleton = self._skeleton(params)
        torch_private.forget_parametrizations(self.module)
        try:
            if skeleton.trains in self.watched and not torch_private.is_traced(next(iter(params.values()), None)):
                out = skeleton.root(*args, **kwargs)
            else:
                out = self._watched_call(skeleton, args, kwargs)
        finally:
            torch_private.forget_parametrizations(self.module)
        if self.mutable:
            return out, dict(skeleton.root.named_buffers())
        skeleton.refuse_updates()
        return out

    def _watched_call(self, skeleton: _Skeleton, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A first call, or a trace: is every parameter taken from where it was put?"""
        with _Watch(self.module, skeleton.given):
            out = skeleton.root(*args, **kwargs)
        self.watched.add(skeleton.trains)
        return out

    def find_held(self, wanted: Callable[[Any], bool]) -> str | None:
        """The name of a tensor that the module holds beside its parameters and buffers, and has not computed."""
        own = _own(self.module)
        for name, value in _attributes(self.module):
            found = first(value, lambda x: _is_beside(x, own) and wanted(x) and x.is_leaf)
            if found:
                return f"{name}{found[0]}"
        return None

    def _skeleton(self, params: Mapping[str, torch.Tensor]) -> _Skeleton:
        modes = self.training.by_part()
        if isinstance(params, Mapping):
            skeleton = _Skeleton(self.module, params, modes, grows=self.mutable)
            if skeleton.fits:
                return skeleton
        return _Skeleton(self.module, _by_first_name(self.module, params, grows=self.mutable), modes, grows=True)

    @property
    def __signature__(self) -> inspect.Signature:
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        others = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY else p
            for p in inspect.signature(self.module.forward).parameters.values()
        ]
        return inspect.Signature([first, *others])


class _Watch(TorchFunctionMode):
    """Refuses to compute with a parameter of the module itself, which another was given for.

    What a forward reads from a global, from its class, or from an object that can't be renewed, nobody can replace.
    """

    def __init__(self, module: torch.nn.Module, given: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.names = {id(t): name for name, t in module.named_parameters() if id(t) in given}
        self.own = _own(module)
        for name, value in _attributes(module):
            first(value, functools.partial(self._add_computed, name))

    def _add_computed(self, name: str, x: Any) -> bool:
        if _is_beside(x, self.own) and x.requires_grad and not x.is_leaf:
            self.names[id(x)] = name
        return False  # go on looking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name_of(func) not in _LOOKS:
            for x in torch_pytree.tree_leaves((args, kwargs)):
                name = isinstance(x, torch.Tensor) and (self.names.get(id(x)) or self.names.get(id(x._base)))
                if name:
                    raise UnsupportedError(
                        f"the module computes with its own {name}, which it reaches by a way that can't be followed",
                        hint="Reach it by an attribute, or cross a function that calls torch.func.functional_call",
                    )
        return func(*args, **(kwargs or {}))


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of every part of a module, by name, but for its tables."""
    for path, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute not in _TABLES:
                yield f"{path}.{attribute}".removeprefix("."), value


def _own(module: torch.nn.Module) -> set[int]:
    """The parameters and buffers of a module, by their identity."""
    return {id(t) for t in (*module.parameters(), *module.buffers())}


def _is_beside(x: Any, own: set[int]) -> bool:
    """Whether a value is a tensor that is none of them."""
    return isinstance(x, torch.Tensor) and id(x) not in own


def _name_of(func: Any) -> str:
    """The name of a function; of the getter of an attribute, that of the attribute."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


# What says nothing of the values of a tensor.
_LOOKS = frozenset({
    "__hash__", "__len__", "device", "dim", "dtype", "element_size", "get_device", "grad_fn", "is_complex",
    "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_nested", "is_quantized",
    "is_signed", "is_sparse", "itemsize", "layout", "names", "nbytes", "ndim", "ndimension", "nelement", "numel",
    "requires_grad", "shape", "size", "storage_offset", "stride", "type"
})  # fmt: skip


class _Training(threading.local):
    """Whether each part of a module trains: as the module says, or, in a compiled program, as it said when traced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.traced: tuple[bool, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Training, (self.module,)

    def now(self) -> tuple[bool, ...]:
        return self.traced or tuple(part.training for part in self.module.modules())

    def tensors(self) -> list[torch.Tensor]:
        return []  # every call has its own

    def constants(self) -> Hashable:
        return constant(self.module)

    def put_back(self) -> Any:
        return contextlib.nullcontext()

    def by_part(self) -> dict[int, bool]:
        """The same by the identity of the part, in a compiled program; empty where the module itself says it."""
        return dict(zip(map(id, self.module.modules()), self.traced, strict=True)) if self.traced else {}

    @contextlib.contextmanager
    def under(self, modes: tuple[bool, ...]) -> Generator[None]:
        before, self.traced = self.traced, modes
        try:
            yield
        finally:
            self.traced = before


class ClosedOver:
    """Whether the modules train that a function reads from its closure: a program that was traced is of that mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def now(self) -> tuple[bool, ...]:
        modules = (x for x in self._read() if isinstance(x, torch.nn.Module))
        return tuple(part.training for module in modules for part in module.modules())

    def tensors(self) -> list[torch.Tensor]:
        return [
            t for x in self._read() for t in ((x,) if isinstance(x, torch.Tensor) else (*x.parameters(), *x.buffers()))
        ]

    def constants(self) -> Hashable:
        return constants_of(self.function)

    @contextlib.contextmanager
    def put_back(self) -> Generator[None]:
        parts = [part for x in self._read() if isinstance(x, torch.nn.Module) for part in x.modules()]
        tables = [vars(part)[name] for part in parts for name in ("_parameters", "_buffers")]
        before = list(map(dict, tables))
        try:
            yield
        finally:
            for table, known in zip(tables, before, strict=True):
                for name in [name for name, t in table.items() if t is not None and torch_private.is_traced(t)]:
                    table[name] = known.get(name)

    def _read(self) -> list[torch.Tensor | torch.nn.Module]:
        """The tensors and modules that it reads, and is not given."""
        found: list[torch.Tensor | torch.nn.Module] = []

        def collect(x: Any) -> bool:
            if isinstance(x, torch.Tensor | torch.nn.Module):
                found.append(x)
            return False  # go on looking

        find_closed_over(self.function, collect, follow=True)
        return found

    def under(self, modes: Any) -> Any:
        del modes  # the function reads the modules where they are
        return contextlib.nullcontext()


# --- the skeleton -----------------------------------------------------------------------------------------------------

_PLAIN = frozenset({bool, int, float, str, type(None), torch.device, torch.dtype, torch.Size, type})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})  # that are made anew, where they are empty, by their type
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_LAZY = frozenset({UninitializedParameter, UninitializedBuffer})


class _Skeleton:
    """The objects of a module anew, holding the given tensors wherever the module holds its own.

    What refers to the module or its parts by another way than its tables is followed: lists, dicts, bound methods, a
    parent kept by its child. A function that closes over them can't be.

    Attributes:
        root: the module anew.
        fits: whether every parameter was given, of its shape and kind, and nothing else was.
    """

    def __init__(
        self, module: torch.nn.Module, params: Mapping[str, torch.Tensor], modes: dict[int, bool], *, grows: bool
    ) -> None:
        self.params = params
        self.modes = modes  # whether a part trains, by its identity, where the part itself does not say it
        self.grows = grows  # whether a buffer may be given in another shape
        self.fits = True
        self.used = 0
        self.given: dict[int, torch.Tensor] = {}  # by the identity of the tensor that each stands for
        self.made: dict[int, torch.nn.Module] = {}
        self.new: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        self.buffers: list[_Buffer] = []
        self.statistics: list[str] = []
        self.trains = False
        self.root = self.of(module, "")
        self.fits = self.fits and self.used == len(params)
        if self.fits:
            for part, new in self.new:  # grows, where a part is found that no table holds
                self.follow_attributes(part, new)

    def of(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """The skeleton of a part, by its tables; one that is shared stays shared."""
        made = self.made.get(id(module))
        if made is not None:
            return made
        attributes, params, given = module.__dict__, self.params, self.given
        children = attributes["_modules"]
        if "_orig_mod" in children:  # compiled code is bound to the module that it was made from
            original: Any = children["_orig_mod"]
            made = self.made[id(module)] = self.of(original, f"{prefix}_orig_mod.")
            return made
        kind: Any = type(module)
        new: torch.nn.Module = object.__new__(kind)
        self.made[id(module)] = new
        self.new.append((module, new))
        own = new.__dict__
        own.update(attributes)
        for name in slots_of(kind):
            if hasattr(module, name):
                object.__setattr__(new, name, getattr(module, name))
        own["_compiled_call_impl"] = None  # `module.compile()` has compiled the calls of the module itself
        if "sparse" in own and issubclass(kind, torch.nn.Embedding | torch.nn.EmbeddingBag):
            own["sparse"] = False  # of the gradient, which is the same: JAX has dense ones
        if self.modes:
            own["training"] = self.modes.get(id(module), module.training)
        self.trains |= own["training"]
        parameters = own["_parameters"] = attributes["_parameters"].copy()  # no Parameter goes in, as torch has it
        for name, old in parameters.items():
            if old is None:
                continue
            found = given.get(id(old))  # under the first of its names, where it has several
            if found is None:
                found = params.get(prefix + name)
                if found is None or not _stands_for(found, old):
                    self.fits = False
                    continue
                self.used += 1
                given[id(old)] = found
                found._is_param = True  # type: ignore[attr-defined] # what asks `isinstance(x, Parameter)` is told so
            parameters[name] = found
        own["_buffers"] = self.copies(module, prefix, trains=own["training"]) if attributes["_buffers"] else {}
        own["_modules"] = {
            name: None if child is None else self.of(child, f"{prefix}{name}.") for name, child in children.items()
        }
        return new

    def copies(self, module: torch.nn.Module, prefix: str, *, trains: bool) -> dict[str, torch.Tensor | None]:
        """The buffers of a part, as copies, which the part may write to."""
        table = module._buffers.copy()
        for name, old in table.items():
            before: Any = self.params.get(prefix + name)
            if before is not None:
                self.used += 1
                if not (old is None or _stands_for(before, old, grown=self.grows)):
                    self.fits = False
                    continue
            elif old is None:
                continue
            else:
                before = old
            copy = self.given.get(id(old))  # of a buffer with several names; of one that was None, there is none
            if copy is None:
                if old is not None and WIDE_INTS.get(old.dtype) is before.dtype:
                    before = before.to(old.dtype)  # it came from JAX in 32 bits
                copy = before.clone()
                if old is not None:
                    self.given[id(old)] = copy
            table[name] = copy
            self.buffers.append(_Buffer(prefix + name, table, name, before, copy))
        if trains and "running_mean" in table and getattr(module, "track_running_stats", False):
            # Batch statistics are updated in place, and no version tells.
            self.statistics += [prefix + n for n in ("running_mean", "running_var") if table.get(n) is not None]
        return table

    def refuse_updates(self) -> None:
        """Raise if the module wrote to its buffers."""
        written = [buffer.name for buffer in self.buffers if buffer.is_written(compare=self.trains)]
        if any(len(new._buffers) > len(part._buffers) for part, new in self.new):
            known = {buffer.name for buffer in self.buffers}
            written += [name for name, _ in self.root.named_buffers() if name not in known]
        names = list(dict.fromkeys(self.statistics + written))
        if names:
            raise UnsupportedError(
                f"the module would update its {'buffer' if len(names) == 1 else 'buffers'} {' and '.join(names)}",
                hint="Use as_jax(mutable=True), which returns them, or call module.eval() first",
            )

    # What the attributes of a part refer to.

    def follow_attributes(self, module: torch.nn.Module, new: torch.nn.Module) -> None:
        """The values of the attributes, with the module's own parts and tensors in them replaced."""
        own = new.__dict__
        for name, value in own.items():
            kind = type(value)
            if kind in _CONTAINERS and not value:  # most are: tables of hooks
                own[name] = kind()
            elif kind not in _PLAIN and name not in _TABLES:
                own[name] = self.follow(value, module, name)

    def follow(self, value: Any, module: torch.nn.Module, name: str) -> Any:
        """A value of an attribute, with the module's own parts and tensors in it replaced."""
        kind: Any = type(value)
        if issubclass(kind, torch.nn.Module):
            return self.made.get(id(value)) or (self.of(value, f"{name}.") if self.is_part(value) else value)
        if issubclass(kind, torch.Tensor):
            return self.given.get(id(value), value)
        if kind in (list, tuple, set, frozenset):
            return kind(self.follow(item, module, name) for item in value)
        if kind in (dict, OrderedDict):
            return kind((self.follow(k, module, name), self.follow(v, module, name)) for k, v in value.items())
        if kind is defaultdict:
            items = ((k, self.follow(v, module, name)) for k, v in value.items())
            return defaultdict(value.default_factory, items)
        if kind is deque:
            return deque((self.follow(item, module, name) for item in value), value.maxlen)
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind(*(self.follow(item, module, name) for item in value))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.follow(value.__self__, module, name))
        if isinstance(value, functools.partial):
            arguments = [self.follow(x, module, name) for x in value.args]
            keywords = {k: self.follow(v, module, name) for k, v in value.keywords.items()}
            return functools.partial(self.follow(value.func, module, name), *arguments, **keywords)
        if isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                if cell != types.CellType() and self.holds_part(cell.cell_contents):
                    raise UnsupportedError(
                        f"{type(module).__name__}.{name} is a function that closes over a part of the module: it would "
                        "compute with the module's own parameters",
                        hint="Make it a method, or cross a function that calls torch.func.functional_call",
                    )
        return value

    def is_part(self, module: torch.nn.Module) -> bool:
        """Whether a module holds a tensor that is replaced."""
        return any(id(t) in self.given for t in (*module.parameters(), *module.buffers()))

    def holds_part(self, value: Any) -> bool:
        """Whether a value of a closure is, or holds, what is replaced."""
        if isinstance(value, types.MethodType):
            value = value.__self__
        if isinstance(value, torch.nn.Module):
            return self.is_part(value)
        if isinstance(value, types.FunctionType):
            return any(self.holds_part(c.cell_contents) for c in value.__closure__ or () if c != types.CellType())
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return id(value) in self.given or any(map(self.holds_part, items))


class _Buffer:
    """A buffer of a skeleton: its name, the table and key that hold it, the value before, and the copy put there."""

    __slots__ = ("before", "copy", "key", "name", "table", "version")

    def __init__(self, name: str, table: dict[str, Any], key: str, before: torch.Tensor, copy: torch.Tensor) -> None:
        self.name, self.table, self.key = name, table, key
        self.before, self.copy, self.version = before, copy, torch_private.version_of(copy)

    def is_written(self, *, compare: bool) -> bool:
        """Whether it was replaced or written to; by its value too, where a write may leave no trace."""
        now: Any = self.table.get(self.key)
        return (
            now is not self.copy
            or torch_private.version_of(now) != self.version
            or (compare and _differs(now, self.before))
        )


def _differs(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a value was written without a trace; below a transform or a tracer, nobody can look."""
    if torch_private.functorch_active() or torch_private.is_traced(now) or torch_private.is_traced(before):
        return False
    return now.shape != before.shape or not torch.equal(now, before)


# --- what fits --------------------------------------------------------------------------------------------------------


def _stands_for(new: Any, old: Any, *, grown: bool = False) -> bool:
    """Whether a value may stand for a tensor: of its shape and kind. The precision of a float is the caller's."""
    if not isinstance(new, torch.Tensor) or type(old) in _LAZY or not (grown or new.shape == old.shape):
        return False
    return new.dtype is old.dtype or _kind(new) == _kind(old)


def _kind(t: torch.Tensor) -> Any:
    """Complex, real, or which integer; one of 64 bits comes from JAX in 32."""
    return "complex" if t.is_complex() else "real" if t.is_floating_point() else WIDE_INTS.get(t.dtype, t.dtype)


def _by_first_name(module: torch.nn.Module, params: Any, *, grows: bool) -> dict[str, torch.Tensor]:
    """The mapping with every tensor under the first of its names; raises, with all that does not fit, by name."""
    if not isinstance(params, Mapping):
        raise _misfit([f"got {type(params).__name__}, expected a mapping by name"])
    refuse_lazy(module)
    buffers = _buffers_by_name(module)
    wanted: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False)) | buffers
    first: dict[int, str] = {}
    for name, old in wanted.items():
        first.setdefault(id(old), name)
    found: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for given, value in params.items():
        name = given if given in wanted else str(given).removeprefix("_orig_mod.")  # of a module since compiled
        if name not in wanted:
            problems.append(f"{given}: unknown")
            continue
        own: Any = wanted[name]
        canonical = name if own is None else first[id(own)]
        if canonical in found:
            problems.append(f"{given}: tied to {canonical}, which is given too")
        elif own is not None and not _stands_for(value, own, grown=grows and name in buffers):
            problems.append(f"{given}: got {describe(value)}, expected {describe(own)}")
        found[canonical] = value
    problems += [
        f"{name}: missing, expected {describe(old)}"
        for name, old in module.named_parameters()
        if first[id(old)] not in found
    ]
    if problems:
        raise _misfit(problems)
    return found


def _misfit(problems: list[str]) -> LeafError:
    error = LeafError("\n    ".join(["the mapping does not fit the module:", *problems]))
    error.argument = "params"
    error.hint = "Give every parameter by its name in named_parameters(), once"
    return error


def _buffers_by_name(module: torch.nn.Module) -> dict[str, Any]:
    """Every buffer under every name, those that are None too."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules(remove_duplicate=False)
        for name, buffer in part._buffers.items()
    }


def refuse_lazy(module: torch.nn.Module) -> None:
    """Raise for a module whose parameters are still to be made."""
    lazy = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if type(t) in _LAZY]
    if lazy:
        raise UnsupportedError(
            f"{' and '.join(lazy)} {'is' if len(lazy) == 1 else 'are'} not initialised yet",
            hint="Call the module once, so that its lazy parameters get their shapes",
        )


def refuse_module(module: torch.nn.Module) -> None:
    """Raise for a module that is no function of its parameters, or a wrapper around one, by name."""
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for path, part in module.named_modules():
        kind, name = type(part), f"{type(module).__name__}.{path}" if path else type(part).__name__
        proxies = [n for n, child in part._modules.items() if type(child) in weakref.ProxyTypes]
        if proxies:
            raise UnsupportedError(
                f"{name}.{proxies[0]} is a weak proxy, which can't be renewed", hint="Hold the part itself"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"the parameters of a scripted module ({name}) can't be replaced",
                hint="Cross the module that it was made from",
            )
        if isinstance(part, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel) or (
            kind.__name__ == "FullyShardedDataParallel"
        ):
            raise UnsupportedError(
                f"{name} wraps a module for several devices", hint="Cross the module in it, module.module"
            )
        if isinstance(part, sharded):
            raise UnsupportedError(
                f"the parameters of {name} are sharded by fully_shard", hint="Cross the module before it is sharded"
            )
        hooked = [n for n, p in part.named_parameters(recurse=False) if p._backward_hooks]
        if hooked:
            raise UnsupportedError(
                f"the parameter {f'{path}.{hooked[0]}' if path else hooked[0]} has hooks, which would not run",
                hint="Remove them, and change the gradient in JAX",
            )
        if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise UnsupportedError(
                f"{name} is quantised ({kind.__module__}.{kind.__name__}): its parameters are packed, not tensors",
                hint="Cross the module that it was converted from",
            )
