"""A torch module as a function of its parameters, so that the rest never sees a module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from interop._errors import LeafError, UnsupportedError


class ModuleFunction:
    """`(params, *args, **kwargs)` to the module's output, with `params` as `torch.func.functional_call` takes them.

    Every call runs on a fresh skeleton: the same submodules, with tables of their own, and no copy of a tensor. The
    module is never touched, from any number of threads; the skeleton lives as long as the graph that was recorded on
    it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.__name__ = type(module).__name__
        self.__doc__ = module.__doc__

    def __call__(self, params: Mapping[str, torch.Tensor], /, *args: Any, **kwargs: Any) -> Any:
        _refuse_updates(self.module, params)
        skeleton = _skeleton(self.module, {})
        _fill(skeleton, self.module, params)
        return skeleton(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        others = [
            p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY else p
            for p in inspect.signature(self.module.forward).parameters.values()
        ]
        return inspect.Signature([first, *others])


def _skeleton(module: torch.nn.Module, made: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The module's objects with tables of their own; a submodule that is shared stays shared."""
    if id(module) not in made:
        new = made[id(module)] = module.__class__.__new__(module.__class__)
        new.__dict__.update(module.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            new.__dict__[table] = dict(module.__dict__[table])
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else _skeleton(child, made)
    return made[id(module)]


def _fill(skeleton: torch.nn.Module, module: torch.nn.Module, params: Mapping[str, torch.Tensor]) -> None:
    """Put the given tensors in the skeleton, under every name that the tensor they stand for has in the module."""
    wanted = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    given = {id(wanted[name]): value for name, value in params.items() if name in wanted}
    unknown = sorted(set(params) - set(wanted))
    missing = [name for name, _ in module.named_parameters() if id(wanted[name]) not in given]
    if unknown or missing:
        raise LeafError(
            "the mapping does not fit the module's parameters",
            got=f"unknown {unknown}" if unknown else f"missing {missing}",
            hint="Give every parameter by its name in named_parameters()",
        )
    for name, old in wanted.items():
        if id(old) in given:
            path, _, last = name.rpartition(".")
            owner = skeleton.get_submodule(path)
            table: Any = owner._parameters if last in owner._parameters else owner._buffers
            table[last] = given[id(old)]  # a plain tensor, as functional_call has it


def _refuse_updates(module: torch.nn.Module, params: Mapping[str, torch.Tensor]) -> None:
    """Raise for a module that would write to its buffers: batch statistics are updated in place, and nothing tells."""
    for name, part in module.named_modules():
        if (
            part.training
            and getattr(part, "track_running_stats", False)
            and part._buffers.get("running_mean") is not None
        ):
            prefix = f"{name}." if name else ""
            if f"{prefix}running_mean" not in params:
                raise UnsupportedError(
                    f"the module would update its buffers {prefix}running_mean and {prefix}running_var",
                    hint="Call module.eval() first: mutable=True is not there yet",
                )
