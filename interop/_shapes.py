"""Shapes of results that torch's fake tensors do not say, because some other result depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ATEN = torch.ops.aten


def _ctc_loss(log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    """The losses f[batch], and what the derivative alone reads, as wide as the longest target."""
    steps, batch = log_probs.shape[:2]
    return log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 1)


def _lstsq(a: torch.Tensor, b: torch.Tensor, rcond: Any = None, *, driver: str | None = None) -> Any:
    """Solution, residuals, ranks and singular values, as the documentation of `torch.linalg.lstsq` has them.

    Of two drivers the residuals depend on the rank.
    """
    del rcond
    driver = driver or ("gelsy" if a.is_cpu else "gels")
    (*batch, m, n), is_vector = a.shape, b.dim() == 1 or b.shape == a.shape[:-1]
    if driver in ("gelsd", "gelss") and m > n:
        return NotImplemented
    k = [] if is_vector else [b.shape[-1]]
    real = a.abs().dtype
    return (
        a.new_empty([*batch, n, *k]),
        a.new_empty([*batch, *(k or [1])] if driver == "gels" and m > n else [0], dtype=real),
        a.new_empty([0] if driver == "gels" else batch, dtype=torch.int64),
        a.new_empty([*batch, min(m, n)] if driver in ("gelsd", "gelss") else [0], dtype=real),
    )


SHAPES: dict[Any, Callable[..., Any]] = {
    _ATEN._ctc_loss.default: _ctc_loss,
    _ATEN._ctc_loss.Tensor: _ctc_loss,
    _ATEN.linalg_lstsq.default: _lstsq,
}
