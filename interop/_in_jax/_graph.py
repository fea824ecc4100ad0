"""A captured graph, made simpler, and as the Python code that runs it: one line for each operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from interop._private import torch as torch_private
from interop._side import Leaves

_ATEN = torch.ops.aten
_AS_IS: Mapping[Any, torch.dtype] = {}


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured graph: it keeps nothing, and writes to nothing that it is given.

    Attributes:
        run: tensors to tensors. Every cast and every gradient is in it: autograd and autocast have no part in it.
        plain: whether it is made of torch's own operations alone, so that no Python of others runs in it, and writes to
            nothing.
    """

    run: Callable[..., Leaves]
    plain: bool


# --- made simpler -----------------------------------------------------------------------------------------------------

# These write to running statistics, and their schemas don't say so.
_STATISTICS = frozenset(
    {_ATEN.native_batch_norm.default, _ATEN.cudnn_batch_norm.default, _ATEN.miopen_batch_norm.default}
)


def simplify(graph: torch.fx.Graph) -> None:
    """Leave out what changes nothing: copies, where nobody writes; a view that undoes another; a power of one."""
    for node in list(graph.nodes):
        source = _the_same(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _the_same(node: Any) -> Any:
    """An earlier node of the same value; None if there is none."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.args[0]
    if node.target in (_ATEN.detach.default, _ATEN.alias.default):
        return source
    if node.target is _ATEN.clone.default and source.op in ("placeholder", "get_attr"):
        return None if any(map(_writes, reached(node.users, lambda user: user.users))) else source
    if node.target in (_ATEN.t.default, _ATEN.transpose.int) and source.target is node.target:
        return source.args[0] if set(source.args[1:]) == set(node.args[1:]) else None
    if node.target is _ATEN.pow.Tensor_Scalar and node.args[1] == 1:
        return source if _dtype_of(source) is _dtype_of(node) else None
    return None


def _dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of what it makes; None where that is not known, or no tensor."""
    return getattr(node.meta.get("val"), "dtype", None)


def _writes(node: Any) -> bool:
    return torch_private.writes(node) or node.target in _STATISTICS


def reached(starts: Iterable[Any], step: Callable[[Any], Iterable[Any]]) -> set[Any]:
    """The nodes themselves, and all that lead from one to the next by this step."""
    found: set[Any] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(step(node))
    return found


def ancestors(ends: Iterable[Any], stop: Iterable[Any] = ()) -> set[Any]:
    """The nodes among the ends, and all that they are made from, up to where it stops."""
    given = set(stop)
    nodes = (node for node in ends if isinstance(node, torch.fx.Node))
    return reached(nodes, lambda node: () if node in given else node.all_input_nodes)


# --- as code ----------------------------------------------------------------------------------------------------------


def _bernoulli_like(x: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(x).bernoulli_(p)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    _ATEN.view.default: torch.reshape,  # XLA hands residuals over densely packed
    _ATEN._unsafe_view.default: torch.reshape,
    _ATEN.bernoulli.p: _bernoulli_like,  # it draws in another order than a dropout, where the axes are permuted
    _ATEN._assert_async.default: torch_private.check,  # torch's own has no batches, and is the end of a GPU's context
    _ATEN._assert_async.msg: torch_private.check,
    operator.getitem: operator.getitem,
}


def compiled(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    given: Mapping[Any, torch.dtype] = _AS_IS,
    acts: Sequence[Any] = (),
) -> Graph:
    """The part of a module between these nodes; an output that is no node is a function that makes it.

    Some inputs may be `given` in another dtype than they have in the graph: they are cast to this one first. What
    `acts` is run too, though nobody reads what it returns.
    """
    code = _Code(module)
    needed = ancestors([*outputs, *acts], inputs)
    nodes = [
        node for node in module.graph.nodes if node in needed and node.op == "call_function" and node not in inputs
    ]
    last = {source: node for node in nodes for source in (*node.all_input_nodes, node)}
    parameters = list(map(code.name, inputs))
    for node, dtype in given.items():
        code.line(f"{code.name(node)} = {code.name(node)}.to({code.constant(dtype)})")
    for node in nodes:
        code.call(node)
        dead = [x for x in (*node.all_input_nodes, node) if last[x] is node and x not in outputs and x.op != "get_attr"]
        if dead:
            code.line(f"del {', '.join(map(code.name, dead))}")
    outs = [code.value(out) if isinstance(out, torch.fx.Node) else f"{code.constant(out)}()" for out in outputs]
    code.line(f"return ({''.join(f'{out}, ' for out in outs)})")
    plain = all(_is_plain(node.target) for node in nodes) and not any(map(_writes, acts))
    return Graph(code.function(parameters), plain)


def _is_plain(target: Any) -> bool:
    return target in _INSTEAD or getattr(target, "namespace", "") in ("aten", "prims")


class _Code:
    """A function in the making: its lines, and the constants that they name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[Any, str] = {}

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def name(self, node: Any) -> str:
        return self.names.setdefault(node, f"x{len(self.names)}")

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def value(self, argument: Any) -> str:
        """An argument as an expression."""
        if isinstance(argument, torch.fx.Node):
            if argument.op == "get_attr":
                return self.constant(operator.attrgetter(str(argument.target))(self.module))
            return self.name(argument)
        if isinstance(argument, list | tuple):
            items = "".join(f"{self.value(item)}, " for item in argument)
            return f"[{items}]" if isinstance(argument, list) else f"({items})"
        return repr(argument) if type(argument) in (int, bool, type(None)) else self.constant(argument)

    def call(self, node: Any) -> None:
        run = _INSTEAD.get(node.target) or torch_private.quick_call(node)
        keywords = [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        self.line(f"{self.name(node)} = {self.constant(run)}({', '.join([*map(self.value, node.args), *keywords])})")

    def function(self, parameters: Iterable[str]) -> Callable[..., Leaves]:
        lines = [f"def graph({', '.join(parameters)}):", *self.lines]
        exec(compile("\n".join(lines), __file__, "exec"), self.constants)  # noqa: S102 - of names and numbers alone
        function: Callable[..., Leaves] = self.constants.pop("graph")
        return function
