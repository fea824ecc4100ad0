"""Sizes that torch keeps open in a trace: output shapes as expressions of input shapes.

Torch's symbols become JAX's symbolic dimensions, JAX infers the shapes, and its expressions are read back in torch's
symbols. Where JAX needs a size itself (a branch on it, a reshape it can't prove), the size is fixed for that trace, and
torch guards it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from interop._abstract import Aval
from interop._derive import Static
from interop._errors import InteropError
from interop._in_torch._flat import JaxFlat
from interop._leaf import TORCH_OF, jax_dtype
from interop._private import torch as torch_private


@dataclass(frozen=True)
class Shaped:
    """What is known of the outputs of an op: sizes are numbers, or torch's symbols."""

    shapes: tuple[tuple[Any, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    structure: Static
    effects: bool


def is_open(xs: Sequence[torch.Tensor]) -> bool:
    """Whether a size among those of the tensors is a symbol."""
    return any(isinstance(size, torch.SymInt) for x in xs for size in x.shape)


def avals_of(flat: JaxFlat, xs: Sequence[torch.Tensor]) -> tuple[Aval, ...]:
    """The avals in which JAX sees these tensors. A symbolic size is fixed."""
    return tuple(Aval(tuple(map(int, x.shape)), dtype) for x, dtype in zip(xs, _dtypes(flat, xs), strict=True))


def _dtypes(flat: JaxFlat, xs: Sequence[torch.Tensor]) -> list[np.dtype[Any]]:
    """The dtypes in which JAX sees these tensors; raises for one that it can't hold."""
    found: list[np.dtype[Any]] = []
    for index, x in enumerate(xs):
        try:
            found.append(jax_dtype(x.dtype, x64=flat.x64))
        except InteropError as error:
            raise flat.locate(error.at(index))  # noqa: B904 - the same error, located
    return found


def shaped(flat: JaxFlat, xs: Sequence[torch.Tensor]) -> Shaped:
    """The shapes and dtypes of the outputs for these inputs, and their structure."""
    for shared in (False, True) if is_open(xs) else ():
        try:
            return _shaped_openly(flat, _Symbols(xs, shared=shared))
        except Exception:  # noqa: BLE001, S112 - JAX needs a size, or that two are one; the user's error comes again
            continue
    outputs = flat.outputs(avals_of(flat, xs))
    dtypes = tuple(TORCH_OF[aval.dtype] for aval in outputs.avals)
    return Shaped(tuple(aval.shape for aval in outputs.avals), dtypes, outputs.structure, outputs.effects)


def _shaped_openly(flat: JaxFlat, symbols: _Symbols) -> Shaped:
    dtypes = _dtypes(flat, symbols.xs)
    inputs = tuple((symbols.text(x.shape), dtype) for x, dtype in zip(symbols.xs, dtypes, strict=True))
    bounds = tuple(symbols.bounds)
    texts, out_dtypes, structure, effects = flat.memo(("open", inputs, bounds), lambda: _infer(flat, inputs, bounds))
    for one, other in symbols.equal:
        torch_private.same_size(one, other)  # torch guards it, as for an operation of its own that needs it
    return Shaped(tuple(tuple(map(symbols.read, text)) for text in texts), out_dtypes, structure, effects)


def _infer(flat: JaxFlat, inputs: Sequence[tuple[str, Any]], bounds: Sequence[str]) -> Any:
    """The output shapes as texts of JAX's, the dtypes and the structure, for input shapes as texts."""
    from jax import export  # noqa: PLC0415 - costs an import; only open sizes pay

    scope = export.SymbolicScope(bounds)
    structs = [jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), dtype) for text, dtype in inputs]
    with jax.enable_x64(flat.x64):
        program, (outs, structure) = jax.make_jaxpr(flat.fn, return_shape=True)(*structs)
    texts = [tuple(size if isinstance(size, int) else str(size) for size in out.shape) for out in outs]
    return texts, tuple(TORCH_OF[np.dtype(out.dtype)] for out in outs), structure, bool(program.effects)


class _Symbols:
    """The symbols in the sizes of some tensors, by the names that JAX gets to see."""

    def __init__(self, xs: Sequence[torch.Tensor], *, shared: bool) -> None:
        self.xs = xs
        sizes = [size for x in xs for size in x.shape if isinstance(size, torch.SymInt)]
        self.named: dict[str, Any] = {}
        self.equal: list[tuple[Any, Any]] = []
        self.texts: dict[str, str] = {}
        for size in sizes:
            name = torch_private.symbol_of(size)
            if name:
                self.named[name] = size
        if shared:
            self._share()
        for size in sizes:  # an expression of symbols that are sizes themselves, or a symbol of its own
            if str(size) in self.texts:
                continue
            text = torch_private.expression_of(size, self.named)
            if text is None:
                text = f"expression{len(self.texts)}"
                self.named[text] = size
            self.texts[str(size)] = text
        # Torch makes no symbol of the sizes 0 and 1, and JAX need not ask.
        self.bounds = [f"{name} >= {max(torch_private.least(size), 1)}" for name, size in self.named.items()]

    def _share(self) -> None:
        """Take sizes for one that are equal in the call that is traced."""
        first: dict[int, str] = {}
        for name, size in list(self.named.items()):
            hint = torch_private.size_hint(size)
            if hint is None or first.setdefault(hint, name) == name:
                continue
            self.equal.append((self.named[first[hint]], size))
            self.texts[str(size)] = first[hint]
            del self.named[name]

    def text(self, shape: Sequence[Any]) -> str:
        """A shape as JAX parses it."""
        return ", ".join(self.texts[str(n)] if isinstance(n, torch.SymInt) else str(int(n)) for n in shape)

    def read(self, size: int | str) -> Any:
        """A size in JAX's words as torch's."""
        if isinstance(size, int):
            return size
        return eval(size.replace("^", "**"), {"__builtins__": {}}, _OPERATIONS | self.named)  # noqa: S307 - JAX's own text


_OPERATIONS: dict[str, Any] = {
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": torch.sym_max,
    "min": torch.sym_min,
    "non_negative": lambda n: torch.sym_max(n, 0),
}
