"""The forward and the backward of a torch function as two graphs, with the residuals between them.

The function is traced once on fake tensors together with its gradient; the joint graph is then cut at the outputs.
Forward is what the outputs need. Backward is the rest of what the gradients need, and the forward values that it reads
are the residuals.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as torch_pytree

from interop._abstract import Aval, Check, kept_words
from interop._derive import NOTHING, Levels, Mask, Static
from interop._errors import InteropError, named
from interop._in_jax._flat import TorchFlat
from interop._in_jax._graph import Graph, ancestors, compiled, reached, simplify
from interop._in_jax._random import seeding
from interop._leaf import TORCH_OF, WIDE_FLOATS, jax_dtype, traced_device, x64_enabled
from interop._log import tell
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._side import TORCH, Leaf, Leaves

_ATEN = torch.ops.aten


@dataclass(eq=False, repr=False)
class Capture:
    """A captured gradient.

    Attributes:
        forward: primals to outputs and new residuals.
        backward: `(*saved, *cotangents of the inexact outputs)` to the cotangents of the active primals.
        count: the number of outputs.
        saved: where each saved value is found: ("input", i), ("output", i) or ("residual", i).
        residuals: the avals of the new residuals.
        inputs: the number of primals.
        inexact: the avals of the outputs that have a derivative.
        linear: whether the function is linear in the active primals: its backward reads nothing that depends on them.
        draws: whether the forward draws random numbers, so that running it again would not give the same.
        unfollowed: which inexact outputs autograd does not follow.
        read: the constants whose values the trace has asked.
    """

    forward: TorchFlat
    backward: TorchFlat
    count: int
    saved: tuple[tuple[str, int], ...]
    residuals: tuple[Aval, ...]
    inputs: int
    inexact: tuple[Aval, ...]
    linear: bool
    draws: bool
    unfollowed: Mask = ()
    read: tuple[torch_private.Read, ...] = ()

    def find(self, primals: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """The saved values, from the primals and what the forward returned."""
        of = {"input": primals, "output": results[: self.count], "residual": results[self.count :]}
        return [of[origin][i] for origin, i in self.saved]

    @functools.cached_property
    def push(self) -> TorchFlat:
        """`(*saved, *tangents of the active primals)` to those of the inexact outputs, without running the forward.

        It is the transpose of the backward, which is linear in its cotangents.
        """
        count = len(self.saved)

        def push(*leaves: Leaf) -> tuple[Leaves, Static]:
            saved, tangents = leaves[:count], leaves[count:]
            zeros = [torch.zeros(a.shape, dtype=TORCH_OF[a.dtype], device=tangents[0].device) for a in self.inexact]
            _, pull = TORCH.vjp(lambda *cotangents: self.backward.leaves(*saved, *cotangents), *zeros)
            return tuple(map(TORCH.conjugated, pull(tuple(map(TORCH.conjugated, tangents))))), NOTHING

        return replace(self.backward, fn=push, memos={}, graph=None)

    def vmap(self, size: int) -> Capture:
        """The same over a batch that is the first axis of everything."""
        return self.forward.memo(("capture", self, size), lambda: replace(
            self,
            forward=self.forward.vmap((0,) * self.inputs),
            backward=self.backward.vmap((0,) * (len(self.saved) + len(self.inexact))),
            residuals=tuple(Aval((size, *aval.shape), aval.dtype) for aval in self.residuals),
            inexact=tuple(Aval((size, *aval.shape), aval.dtype) for aval in self.inexact),
        ))  # fmt: skip


jax_private.weak_in_caches(Capture)  # else it would keep alive what nobody has any more


def capture(flat: TorchFlat, avals: tuple[Aval, ...], active: Mask) -> Capture | None:
    """The captured gradient with respect to the active inputs; None where it has to be recomputed."""
    found = capture_or_reason(flat, avals, active)
    return found if isinstance(found, Capture) else None


def capture_or_reason(flat: TorchFlat, avals: tuple[Aval, ...], active: Mask) -> Capture | str:
    """The same, or why it has to be recomputed."""
    key = ("capture", avals, active, x64_enabled())
    return flat.memo_of_now(key, lambda: _try_capture(flat, avals, active))


def _try_capture(flat: TorchFlat, avals: tuple[Aval, ...], active: Mask) -> Capture | str:
    start = time.perf_counter()
    try:
        # In inference mode nothing is recorded, and every gradient would be zero; anomaly mode looks at values.
        anomalies = torch.autograd.set_detect_anomaly(mode=False)
        with torch.inference_mode(mode=False), anomalies, torch_private.everything_is_saved(), flat.put_back():
            found = _capture(flat, avals, active)
    except Exception as error:
        if flat.levels.example_output is None and _is_of_the_user(error):
            raise
        reason = named(error)
        tell(flat.name, "gradient recomputed, not captured (%s)", reason)
        return reason

    def what() -> str:
        kept = kept_words(found.saved, found.residuals, flat.path, flat.outputs(avals).structure)
        return f"gradient captured (kept for it: {kept})"

    flat.tell_time(what, time.perf_counter() - start)
    return found


def _is_of_the_user(error: BaseException) -> bool:
    """Whether it was raised by a line of the user's: what a tracer raises comes from torch, or from here."""
    if isinstance(error, InteropError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] not in ("torch", "interop", "sympy")


def _capture(flat: TorchFlat, avals: tuple[Aval, ...], active: Mask) -> Capture:
    if flat.key is not None and len(avals[flat.key].shape) > 1:
        raise TypeError("each example of a batch is seeded from a key of its own")
    known = flat.outputs(avals)
    outputs = known.avals
    inexact = [aval for aval in outputs if aval.dtype.kind in "fcV"]
    checks, unfollowed = list(known.checks), list[bool]()
    watch = torch_private.TraceWatch(functools.partial(_checked, checks))
    graph = torch_private.trace(
        _joint(flat, active, unfollowed),
        [
            torch.empty(a.shape, dtype=TORCH_OF[a.dtype], requires_grad=r, device=traced_device())
            for a, r in zip(avals, active, strict=True)
        ],
        [torch.empty(a.shape, dtype=TORCH_OF[a.dtype], device=traced_device()) for a in inexact],
        watch=watch,
    )
    if checks:
        raise TypeError("it asks less of values than it did before")
    cut = _Cut(graph, flat, avals, active, outputs).capture()
    return replace(cut, unfollowed=tuple(unfollowed), read=tuple(watch.constants.read.values()))


def _checked(checks: list[Check], condition: Callable[[], torch.Tensor], known: bool | None) -> bool | None:
    """What the function has to find, and the graph checks in its place; None where it may find this or that."""
    if known is not None:
        answer, error = known, f"what was {known} of a tensor that it closes over is not any more: trace it again"
    elif checks:
        answer, error = checks.pop(0)
    else:
        return None
    _ATEN._assert_async.msg(condition() if answer else ~condition(), error)
    return answer


def _joint(flat: TorchFlat, active: Mask, unfollowed: list[bool]) -> Callable[..., tuple[Any, Any]]:
    """Primals and cotangents to outputs and gradients; says which inexact outputs autograd does not follow."""

    def joint(primals: list[Leaf], cotangents: list[Leaf]) -> tuple[Any, Any]:
        with torch.enable_grad():
            outs, _ = flat.to_differentiate(*[p.clone() for p in primals])  # no leaf: the function may write to it
            inexact = [out for out in outs if TORCH.is_inexact(out)]
            unfollowed[:] = [not out.requires_grad for out in inexact]
            pairs = [(o, c.conj_physical() if o.is_complex() else c)
                     for o, c in zip(inexact, cotangents, strict=True) if o.requires_grad]  # fmt: skip
            wanted = [p for p, a in zip(primals, active, strict=True) if a]
            grads: Sequence[Any] = (None,) * len(wanted)
            if pairs:
                grads = torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        return list(outs), [None if g is None else g.conj_physical() if g.is_complex() else g for g in grads]

    return joint


# Views that are no smaller than what they are views of.
_VIEWS = frozenset({
    _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default, _ATEN._unsafe_view.default,
    _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.expand.default,
})  # fmt: skip

# What is quickly made from what may be smaller, or larger.
_PARTS = frozenset({_ATEN.select.int, _ATEN.slice.Tensor, _ATEN._to_copy.default})
_SPLITS = frozenset({_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.unbind.int})


def _keep_what_is_written_to(graph: torch.fx.Graph) -> None:
    """Copy what a function closes over and writes to where it is read: the backward may come when it is another."""
    written = {n.target for node in graph.nodes if torch_private.writes(node) for n in ancestors([node.args[0]])}
    constants = [node for node in graph.nodes if node.op == "get_attr" and node.target in written]
    aliases = reached(constants, lambda node: filter(torch_private.is_view, node.users))
    for node in list(graph.nodes):
        if node in aliases or torch_private.writes(node):
            continue
        for source in aliases & set(node.all_input_nodes):
            with graph.inserting_before(node):
                copy = graph.call_function(_ATEN.clone.default, (source,))
            copy.meta = dict(source.meta)
            node.replace_input_with(source, copy)


class _Cut:
    """A joint graph cut into a forward and a backward."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        flat: TorchFlat,
        avals: Sequence[Aval],
        active: Mask,
        outputs: Sequence[Aval],
    ) -> None:
        simplify(module.graph)
        _keep_what_is_written_to(module.graph)
        self.module, self.flat, self.avals, self.active, self.count = module, flat, avals, active, len(outputs)
        self.wanted = [aval for aval, a in zip(avals, active, strict=True) if a]
        self.inexact = tuple(aval for aval in outputs if aval.dtype.kind in "fcV")
        nodes = list(module.graph.nodes)
        places = [node for node in nodes if node.op == "placeholder"]
        self.primals, self.cotangents = places[: len(avals)], places[len(avals) :]
        results = list(next(node for node in nodes if node.op == "output").args[0])
        flattened, _ = torch_pytree.tree_flatten(results, is_leaf=lambda x: x is None)
        self.outs, self.grads = flattened[: self.count], flattened[self.count :]
        self.acts = [node for node in nodes if torch_private.acts(node)]
        if ancestors(self.acts) & set(self.cotangents):
            raise TypeError("the gradient writes to what it closes over, or checks a value")
        self.forward_nodes = ancestors([*self.outs, *self.acts])
        self.backward_nodes = ancestors(self.grads) - self.forward_nodes
        self._pull_up_items(nodes)
        self._make_again(nodes)

    def _pull_up_items(self, nodes: Sequence[Any]) -> None:
        """An item of a tuple that the forward makes belongs to the forward: tuples are no residuals."""
        for node in nodes:
            if node.target is operator.getitem and node in self.backward_nodes and node.args[0] in self.forward_nodes:
                self.backward_nodes.discard(node)
                self.forward_nodes.add(node)

    def _make_again(self, nodes: Sequence[Any]) -> None:
        """What the backward reads, and is quickly made from what it has or from less, is made there once more."""
        count = -1
        while count != len(self.backward_nodes):
            count = len(self.backward_nodes)
            for node in reversed(nodes):
                is_forward = node in self.forward_nodes and node not in self.backward_nodes and node not in self.outs
                if is_forward and self._is_read(node) and self._is_quick(node):
                    self.backward_nodes.add(node)

    def _is_read(self, node: Any) -> bool:
        return any(user in self.backward_nodes for user in node.users)

    def _is_quick(self, node: Any) -> bool:
        if node.target in _VIEWS | _SPLITS or _is_constant(node):  # a split is read by the items that are made again
            return True
        if node.target in _PARTS:
            whole = node.args[0]
            others = [user for user in whole.users if user.target in _PARTS]
        elif node.target is operator.getitem and node.args[0].target in _SPLITS:
            whole, others = node.args[0].args[0], node.args[0].users
        else:
            return False
        return self._has(whole) or sum(_size(part) for part in others if self._is_read(part)) >= _size(whole)

    def _has(self, node: Any) -> bool:
        """Whether the backward has it, or makes it of what it has."""
        if node.op in ("placeholder", "get_attr") or node in self.outs or _is_constant(node) or self._is_read(node):
            return True
        return node.target in _VIEWS | _PARTS and self._has(node.args[0])

    def capture(self) -> Capture:
        """The two graphs, and what lies between them."""
        read = [n for node in self.backward_nodes for n in node.all_input_nodes if n not in self.backward_nodes]
        read += [g for g in self.grads if isinstance(g, torch.fx.Node) and g not in self.backward_nodes]
        if not any(node in self.forward_nodes and node not in self.primals for node in read):
            # JAX drops a forward of which nothing is read, with all that it checks.
            read += [node.args[0] for node in self.acts if torch_private.checks(node)][:1]
        order = {node: i for i, node in enumerate(self.module.graph.nodes)}
        between = sorted({n for n in read if n.op != "get_attr" and n not in self.cotangents}, key=order.__getitem__)
        new = [n for n in between if n not in self.primals and n not in self.outs]
        origins = [
            ("input", self.primals.index(n)) if n in self.primals
            else ("output", self.outs.index(n)) if n in self.outs
            else ("residual", new.index(n))
            for n in between
        ]  # fmt: skip
        if any(_is_random(n) for n in self.backward_nodes):
            raise TypeError("the gradient draws random numbers")
        forward = compiled(self.module, self.primals, [*self.outs, *new], acts=self.acts)
        if any(map(_is_fused, self.forward_nodes)):  # else the kernel leaves out the workspace that its backward reads
            forward = replace(forward, run=torch.enable_grad()(forward.run))
        values = self._residual_values(forward.run, new)
        if any(v.dtype in WIDE_FLOATS for v in values) and not x64_enabled():
            raise TypeError("a residual is a 64-bit float")
        avals = tuple(Aval(tuple(v.shape), jax_dtype(v.dtype, x64=x64_enabled())) for v in values)
        real = dict(zip(new, values, strict=True))
        dtypes = {n: (real[n] if n in real else n.meta["val"]).dtype for n in between}
        narrow = {n: t for n, t in dtypes.items() if TORCH_OF[jax_dtype(t, x64=x64_enabled())] is not t}
        zeros = [functools.partial(torch.zeros, w.shape, dtype=TORCH_OF[w.dtype]) for w in self.wanted]
        grads = [zero if grad is None else grad for grad, zero in zip(self.grads, zeros, strict=True)]
        backward = compiled(self.module, [*between, *self.cotangents], grads, narrow)
        key = self.flat.key
        return Capture(
            self._flat(forward if key is None else self._seeded(forward, key), "forward", key),
            self._flat(backward, "backward"),
            self.count,
            tuple(origins),
            avals,
            len(self.primals),
            self.inexact,
            self._is_linear(between),
            key is None and any(map(_is_random, self.forward_nodes)),
        )

    def _seeded(self, graph: Graph, key: int) -> Graph:
        names_one = any(n.kwargs.get("generator") is not None for n in self.forward_nodes)

        def seeded(*leaves: Leaf) -> Leaves:
            with seeding(leaves[key], watch=names_one):
                return graph.run(*leaves)

        return Graph(seeded, plain=False)

    def _is_linear(self, between: Sequence[Any]) -> bool:
        active = {p for p, a in zip(self.primals, self.active, strict=True) if a}
        return not active & ancestors(between)

    def _residual_values(self, forward: Callable[..., Any], new: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Tensors like the residuals: fake ones, or those of a trial, for kernels that keep more than they say."""
        values = [n.meta["val"] for n in new]
        if any(not isinstance(size, int) for v in values for size in v.shape):
            raise TypeError("the shape of a residual depends on values")
        if any(_is_fused(n) or _is_narrow(n) for n in self.forward_nodes):
            zeros = [torch.zeros(a.shape, dtype=TORCH_OF[a.dtype], device=traced_device()) for a in self.avals]
            with seeding(_ANY_KEY):  # so that a trial draws nothing from the user's generators
                values = list(forward(*zeros))[self.count :]
        return values

    def _flat(self, graph: Graph, kind: str, key: int | None = None) -> TorchFlat:
        def flat_fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            with _without_autocast():
                return graph.run(*leaves), NOTHING

        levels = Levels(differentiable=True, jittable=True)
        name, modes = f"{self.flat.name}.{kind}", self.flat.modes
        return TorchFlat(TORCH, flat_fn, name, levels, modes=modes, key=key, graph=graph)


_ANY_KEY = torch.zeros(1, dtype=torch.int32)


def _without_autocast() -> contextlib.AbstractContextManager[Any]:
    device = next((d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)), None)
    return torch.autocast(device, enabled=False) if device else contextlib.nullcontext()


def _is_constant(node: Any) -> bool:
    """Whether it is made of nothing, and always the same."""
    return node.op == "call_function" and not node.all_input_nodes and not _is_random(node)


def _size(node: Any) -> int:
    """In bytes."""
    value: torch.Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _is_random(node: Any) -> bool:
    return torch_private.draws(node.target, node.args, node.kwargs)


def _is_fused(node: Any) -> bool:
    return "mkldnn" in str(node.target)


def _is_narrow(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() < 4
