"""A pull-back of torch that is itself differentiated: what torch takes for a constant there has to say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.autograd.function import BackwardCFunction

from interop._errors import NotDifferentiableError
from interop._private import torch as torch_private

_Tensors: TypeAlias = Sequence[torch.Tensor]


def twice(pull: Callable[[Any], Any], reads: _Tensors, outs: _Tensors) -> Callable[[Any], Any]:
    """The pull-back of these outputs, for whoever differentiates it in what the function reads.

    A backward that is once_differentiable runs unrecorded. Torch puts a node that raises behind what it returns, and
    does so only where a cotangent requires grad; and that node leads nowhere, so that a gradient in what the function
    was given never comes by it, and is zero.

    Raises:
        NotDifferentiableError: it would be zero, or lack a part, because a backward was not recorded.
    """
    followed = [x for x in reads if x.requires_grad]
    if not followed or not _has(outs, lambda node: isinstance(node, BackwardCFunction)):
        return pull

    def checked(cotangents: Any) -> Any:
        grads = pull([None if c is None else _tied(c, followed) for c in cotangents])
        if _has(grads, lambda node: node.name() == "torch::autograd::Error"):
            raise NotDifferentiableError(
                "a second derivative of an autograd.Function whose backward is once_differentiable",
                hint="Write its backward in operations of torch, without once_differentiable",
            )
        return grads

    return checked


def refuse_scripted(reads: _Tensors, outs: _Tensors) -> None:
    """Raise for what `torch.func` does not differentiate again: the backward that TorchScript has written.

    It does so once a function has been run for a gradient. Autograd itself differentiates it.
    """
    again = any(x.requires_grad for x in reads) or torch_private.has_tangent(reads)
    if again and _has(outs, lambda node: "DifferentiableGraph" in node.name()):
        raise RuntimeError("torch.func takes the backward of TorchScript for a constant")


def _tied(cotangent: torch.Tensor, followed: _Tensors) -> torch.Tensor:
    """The cotangent as one that depends on all of these, with the derivative zero."""
    for x in followed:
        nothing = x.reshape(-1)[:0].sum()
        cotangent = cotangent - (nothing.real if x.is_complex() else nothing).to(cotangent.dtype)
    return cotangent


def _has(outs: _Tensors, is_sought: Callable[[Any], bool]) -> bool:
    """Whether such a node is among what autograd has recorded of these."""
    nodes: list[Any] = [out.grad_fn for out in outs]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            if is_sought(node):
                return True
            seen.add(node)
            nodes += [source for source, _ in node.next_functions]
    return False
