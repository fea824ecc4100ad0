"""A torch module as a function of its parameters, so that the rest never sees a module."""

from __future__ import annotations

import contextlib
import inspect
import threading
import types
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
        skeleton = _skeleton(self.module, {})
        for part, training in zip(skeleton.modules(), self.training.now(), strict=True):
            part.training = training
        before = _fill(skeleton, self.module, params)
        versions = {name: _version(buffer) for name, buffer in _buffers(skeleton).items()}
        out = skeleton(*args, **kwargs)
        after = _buffers(skeleton)
        if self.mutable:
            return out, after
        _refuse_updates(skeleton, before, after, versions)
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


def _skeleton(module: torch.nn.Module, made: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The module's objects with tables of their own; a submodule that is shared stays shared."""
    if id(module) not in made:
        new = made[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__.update(module.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            new.__dict__[table] = dict(module.__dict__[table])
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else _skeleton(child, made)
        for name, value in module.__dict__.items():
            if isinstance(value, types.MethodType) and value.__self__ is module:
                new.__dict__[name] = types.MethodType(value.__func__, new)
    return made[id(module)]


def _fill(
    skeleton: torch.nn.Module, module: torch.nn.Module, params: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put the given tensors in the skeleton, under every name that the tensor they stand for has in the module.

    Buffers are copied, and returned as they were.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    wanted = dict(module.named_parameters(remove_duplicate=False)) | buffers
    params = {name.removeprefix(_COMPILED): value for name, value in params.items()}
    given = {id(wanted[name]): value for name, value in params.items() if name in wanted}
    unknown = sorted(set(params) - set(wanted))
    missing = [name for name, _ in module.named_parameters() if id(wanted[name]) not in given]
    if unknown or missing:
        raise LeafError(
            "the mapping does not fit the module's parameters",
            got=f"unknown {unknown}" if unknown else f"missing {missing}",
            hint="Give every parameter by its name in named_parameters()",
        )
    before: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, old in wanted.items():
        value = given.get(id(old))
        if name in buffers:
            # An integer comes from JAX in 32 bits.
            value = before[name] = old if value is None else value if value.is_floating_point() else value.to(old.dtype)
            value = copies.setdefault(id(old), value.clone())
        path, _, last = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        table: Any = owner._buffers if name in buffers else owner._parameters
        table[last] = value  # a plain tensor, as functional_call has it
    return before


def _buffers(skeleton: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(skeleton.named_buffers())


def _refuse_updates(
    skeleton: torch.nn.Module,
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    versions: dict[str, int],
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
        if _version(now) != versions.get(name) or (training and _differs(now, before[name]))
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
