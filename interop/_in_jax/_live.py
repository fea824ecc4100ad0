"""Torch's own graph of one eager call, kept until JAX asks for the gradient.

The graph is owned by an array of one element that travels as a residual: when JAX drops the array, the graph goes. As a
parameter of an equation it would never go: JAX caches by parameters.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from interop._derive import Mask, Static
from interop._in_jax._flat import (
    TorchFlat,
    at_home,
    check_finite,
    home_of,
    result_to_array,
    results_to_arrays,
    tensors_of,
)
from interop._leaf import array_to_tensor, copy_tensor
from interop._private import torch as torch_private
from interop._side import TORCH

_graphs: dict[int, Live] = {}
_numbers = itertools.count()


@dataclass
class Live:
    """Inputs and outputs of one call, with torch's graph between them."""

    inputs: list[torch.Tensor]  # the active ones
    outputs: list[torch.Tensor]  # the inexact ones
    flat: TorchFlat
    avals: Sequence[Any]  # of the arguments, as JAX has them
    active: Mask
    home: Any  # where the results belong, if that is not where results are made

    def pull(self, cotangents: Sequence[Any]) -> list[jax.Array]:
        """The gradients of the active inputs, in JAX's complex convention; an absent cotangent is zero."""
        lost = [c is not None and not o.requires_grad for o, c in zip(self.outputs, cotangents, strict=True)]
        self.flat.refuse_graphless(self.avals, self.active, lost)
        asked = [(o, c) for o, c in zip(self.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        # JAX makes some cotangents on the device that it computes on by default.
        pairs = [(o, TORCH.conjugated(array_to_tensor(c)).to(o.device)) for o, c in asked]
        grads: Sequence[Any] = (None,) * len(self.inputs)
        if pairs:
            grads = torch.autograd.grad(
                [o for o, _ in pairs], self.inputs, [c for _, c in pairs], retain_graph=True, allow_unused=True
            )
        results = [
            result_to_array(torch.zeros_like(x) if g is None else TORCH.conjugated(g))
            for g, x in zip(grads, self.inputs, strict=True)
        ]
        check_finite(results, self.flat.name)
        return at_home(results, self.home)


def forward(flat: TorchFlat, arrays: Sequence[jax.Array], active: Mask) -> tuple[list[jax.Array], Static, jax.Array]:
    """Run it under autograd; returns its outputs, their structure, and the array that owns the graph."""
    with torch.inference_mode(mode=False), torch.enable_grad(), torch_private.everything_is_saved():
        given = zip(tensors_of(arrays), active, strict=True)
        tensors = [torch_private.own_leaf(t) if wanted else t for t, wanted in given]
        # Nobody writes to the leaves, which share JAX's memory. What the function is given is a copy, and no leaf.
        outs, structure = flat.to_differentiate(*[t.clone() for t in tensors])
    inputs = [t for t in tensors if t.requires_grad]
    inexact = [out for out in outs if TORCH.is_inexact(out)]
    live = Live(inputs, inexact, flat, [*map(jax.typeof, arrays)], active, home_of(arrays))
    return at_home(results_to_arrays(outs, structure), live.home), structure, _handle(live)


def _handle(live: Live) -> jax.Array:
    number = next(_numbers)
    handle = copy_tensor(np.array([number], np.int32))
    _graphs[number] = live
    weakref.finalize(handle, _graphs.pop, number, None)
    return handle


def of(handle: jax.Array) -> Live:
    """The graph that this array owns."""
    return _graphs[int(np.asarray(handle)[0])]
