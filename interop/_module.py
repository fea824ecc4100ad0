"""A torch module as a function of its parameters, so that the rest never sees a module."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from interop._errors import LeafError, UnsupportedError
from interop._marshal import find_closed_over
from interop._private import torch as torch_private

_COMPILED = "_orig_mod."


class ModuleFunction:
    """`(params, *args, **kwargs)` to the module's output, with `params` as `torch.func.functional_call` takes them.

    Every call runs on a fresh skeleton: the same submodules, with tables of their own, and no copy of a parameter. The
    module is never touched, from any number of threads; the skeleton lives as long as the graph that was recorded on
    it. Buffers are copies, so that a module may write to them: what it wrote is returned beside its output if the
    function is mutable, and refused if not.
    """

    def __init__(self, module: torch.nn.Module, *, mutable: bool = False) -> None:
        self.module: torch.nn.Module = getattr(module, "_orig_mod", module)  # compiled code knows its own parameters
        self.mutable = mutable
        self.training = _Training(self.module)
        self.__name__ = type(self.module).__name__
        self.__doc__ = self.module.__doc__

    def __call__(self, params: Mapping[str, torch.Tensor], /, *args: Any, **kwargs: Any) -> Any:
        given, before = _matched(self.module, params)
        skeleton = _Skeleton(given, self.training.by_part()).of(self.module)
        put = {name: (buffer, _version(buffer)) for name, buffer in _buffers(skeleton).items()}
        out = skeleton(*args, **kwargs)
        after = _buffers(skeleton)
        if self.mutable:
            return out, after
        _refuse_updates(skeleton, before, after, put)
        return out

    @property
    def __signature__(self) -> inspect.Signature:
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        others = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY else p
            for p in inspect.signature(self.module.forward).parameters.values()
        ]
        return inspect.Signature([first, *others])


class _Training(threading.local):
    """Whether each part of a module trains: as the module says, or, in a compiled program, as it said when traced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.traced: tuple[bool, ...] | None = None

    def now(self) -> tuple[bool, ...]:
        return self.traced or tuple(part.training for part in self.module.modules())

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
        modules: list[torch.nn.Module] = []

        def collect(x: Any) -> bool:
            if isinstance(x, torch.nn.Module):
                modules.append(x)
            return False  # go on looking

        find_closed_over(self.function, collect)
        return tuple(part.training for module in modules for part in module.modules())

    def under(self, modes: Any) -> Any:
        del modes  # the function reads the modules where they are
        return contextlib.nullcontext()


# --- the skeleton -----------------------------------------------------------------------------------------------------

_PLAIN = frozenset({bool, int, float, str, type(None), torch.device, torch.dtype, torch.Size, type})
_TABLES = ("_parameters", "_buffers", "_modules")
_NOT_FOLLOWED = frozenset({*_TABLES, "_compiled_call_impl"})


class _Skeleton:
    """The objects of a module anew, holding the given tensors wherever the module holds its own.

    What refers to the module or its parts by another way than its tables is followed: lists, dicts, bound methods, a
    parent kept by its child. A function that closes over them can't be.
    """

    def __init__(self, given: dict[int, torch.Tensor], training: dict[int, bool]) -> None:
        self.given = given  # by the identity of the tensor that each stands for
        self.training = training
        self.made: dict[int, torch.nn.Module] = {}

    def of(self, module: torch.nn.Module, path: str = "") -> torch.nn.Module:
        """The skeleton of a module; a part that is shared stays shared."""
        made = self.made.get(id(module))
        if made is not None:
            return made
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"the parameters of a scripted module ({path or type(module).__name__}) can't be replaced",
                hint="Cross the module that it was made from",
            )
        if hasattr(module, "_orig_mod"):  # compiled code is bound to the module that it was made from
            original: Any = module._orig_mod
            new = self.made[id(module)] = self.of(original)
            return new
        new = self.made[id(module)] = object.__new__(type(module))
        attributes = module.__dict__
        new.__dict__.update(attributes)
        for table in _TABLES:
            new.__dict__[table] = dict(attributes[table])
        tensors: Any = (new._parameters, new._buffers)  # no Parameter goes in, as functional_call has it
        for own in tensors:
            own.update({name: self.given.get(id(t), t) for name, t in own.items()})
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else self.of(child, f"{type(module).__name__}.{name}")
        new.training = self.training.get(id(module), module.training)
        new.__dict__["_compiled_call_impl"] = None  # `module.compile()` has compiled the calls of the module itself
        for name, value in attributes.items():
            if type(value) not in _PLAIN and name not in _NOT_FOLLOWED:
                new.__dict__[name] = self.follow(value, module, name)
        return new

    def follow(self, value: Any, module: torch.nn.Module, name: str) -> Any:
        """A value of an attribute, with the module's own parts and tensors in it replaced."""
        if isinstance(value, torch.nn.Module):
            return self.made.get(id(value)) or (self.of(value) if self.is_part(value) else value)
        if isinstance(value, torch.Tensor):
            return self.given.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self.follow(item, module, name) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self.follow(v, module, name)) for k, v in value.items())
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


def _matched(
    module: torch.nn.Module, params: Mapping[str, torch.Tensor]
) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
    """The given tensors by the identity of those that they stand for, and copies of the buffers; the buffers before."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    wanted = dict(module.named_parameters(remove_duplicate=False)) | buffers
    params = {name.removeprefix(_COMPILED): value for name, value in params.items()}
    given = {id(wanted[name]): value for name, value in params.items() if name in wanted}
    unknown = sorted(set(params) - set(wanted))
    missing = [name for name, old in wanted.items() if name not in buffers and id(old) not in given]
    if unknown or missing:
        raise LeafError(
            "the mapping does not fit the module's parameters",
            got=f"unknown {unknown}" if unknown else f"missing {missing}",
            hint="Give every parameter by its name in named_parameters()",
        )
    before: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, old in buffers.items():
        value = given.get(id(old), old)
        # An integer comes from JAX in 32 bits.
        before[name] = value if value.is_floating_point() or value.is_complex() else value.to(old.dtype)
        if id(old) not in copies:
            copies[id(old)] = before[name].clone()
    return given | copies, before


def _buffers(skeleton: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(skeleton.named_buffers())


def _refuse_updates(
    skeleton: torch.nn.Module,
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    put: dict[str, tuple[torch.Tensor, int]],
) -> None:
    """Raise for a module that wrote to its buffers. Batch statistics are updated in place, and no version tells."""
    statistics = [
        f"{name}.{buffer}" if name else buffer
        for name, part in skeleton.named_modules()
        if part.training and getattr(part, "track_running_stats", False)
        for buffer in ("running_mean", "running_var")
        if part._buffers.get(buffer) is not None
    ]
    training = any(part.training for part in skeleton.modules())
    written = [
        name
        for name, now in after.items()
        if name not in put
        or now is not put[name][0]
        or _version(now) != put[name][1]
        or (training and _differs(now, before[name]))
    ]
    names = list(dict.fromkeys(statistics + written))
    if names:
        raise UnsupportedError(
            f"the module would update its {'buffer' if len(names) == 1 else 'buffers'} {' and '.join(names)}",
            hint="Use as_jax(mutable=True), which returns them, or call module.eval() first",
        )


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _differs(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a value was written without a trace; below a transform or a tracer, nobody can look."""
    if torch_private.functorch_active() or torch_private.is_traced(now) or torch_private.is_traced(before):
        return False
    return now.shape != before.shape or not torch.equal(now, before)
