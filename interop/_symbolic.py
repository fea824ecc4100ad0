"""A crossing under `torch.fx.symbolic_trace`: one node of the graph, as an operation of torch is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Symbolic(Exception):
    """An argument stands for any value: `torch.fx.symbolic_trace` writes down what is called with it."""

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy

    def written(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call in the graph that is traced, and what stands for its result."""
        target = fn if fn.__name__.isidentifier() else _Named(fn)
        return self.proxy.tracer.create_proxy("call_function", target, args, kwargs)


class _Named:
    """A function without a name (a lambda), as a graph can write it."""

    __name__ = __qualname__ = "function"

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)
