"""The ways in which a derived function can run, tried in order: torch has not every rule for every kernel.

What runs is remembered, so that a function pays for a missing rule once. Nothing here flips a switch of the process:
another thread never sees another kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode

from interop._abstract import aval_of, check_structure, infer_torch
from interop._derive import NOTHING, Flat, FlatFn, Mask, Static, derive_jvp, inexact_part, pick
from interop._errors import AbstractEvalError, InteropError, NotDifferentiableError, UnsupportedError
from interop._in_jax._random import Watched, refused
from interop._log import tell
from interop._private import torch as torch_private
from interop._side import TORCH, Leaf, Leaves
from interop._threads import TAKING_TURNS
from interop._twice import twice


def first_that_runs(name: str, closed_over: Callable[[], list[torch.Tensor]], *ways: FlatFn) -> FlatFn:
    """The first of these that does not raise; what the last one raises, if none does."""
    first, found = 0, False

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        nonlocal first, found
        for index in range(first, len(ways) - 1):
            before = [] if found or any(map(torch_private.is_traced, leaves)) else _kept(closed_over())
            try:  # on copies: it may write to them before it raises
                result = ways[index](*[x.clone() for x in leaves])
            except InteropError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever torch says of a missing rule; the user's error comes again
                for x, version, value in before:
                    if x._version != version:
                        x.data.copy_(value)
                tell(name, "fell back on another way (%s: %s)", type(error).__name__, error)
            else:
                first, found = index, True
                return result
        result = ways[-1](*leaves)
        first = len(ways) - 1
        return result

    return run


def _kept(xs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """What to put back after a way that has written to tensors before it failed."""
    return [(x, x._version, x.detach().clone()) for x in xs if not (torch_private.is_dead(x) or x.is_inference())]


def _versions(xs: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch_private.version_of, xs))


def again(name: str, fn: FlatFn, closed_over: Callable[[], list[torch.Tensor]], *, keyed: bool) -> FlatFn:
    """A derivative that runs its function again: with all that backward needs kept, and nothing that differs then.

    What a checkpoint would run once more, would run with other parameters; without a key, other numbers are drawn; and
    what it writes to a tensor that it closes over, it has written already.
    """

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        with TAKING_TURNS:  # the levels of forward mode belong to the process
            return watching(*leaves)

    def watching(*leaves: Leaf) -> tuple[Leaves, Static]:
        is_real = not any(map(torch_private.is_traced, leaves))
        generators = Watched() if is_real and not keyed else None
        read = closed_over() if is_real else []
        written = _versions(read)
        try:
            with torch_private.everything_is_saved():
                result = fn(*leaves)
        except NotDifferentiableError as error:
            raise error.of(name.partition(".")[0])  # noqa: B904 - the same error, named
        if generators and generators.were_drawn_from():
            raise refused(name, "a derivative ran it again, and drew others")
        if written != _versions(read):
            raise UnsupportedError(
                "it writes to a tensor that it closes over, and a derivative ran it again",
                hint="Make it an argument and a result; of a module: make_functional(module, mutable=True)",
            ).of(name)
        return result

    return run


# --- derivatives ------------------------------------------------------------------------------------------------------


def followed(flat: Flat) -> FlatFn:
    """The function, refused where its results are made of values that autograd has lost sight of.

    A constant has the derivative zero, and so has what is detached; a number that was read from a tensor has another.
    """

    def run(*leaves: Leaf) -> tuple[Leaves, Static]:
        outs, structure = flat.fn(*leaves)
        promised = flat.levels.example_output
        if promised:
            check_structure(structure, promised(tuple(map(aval_of, leaves))).structure, flat.name)
        if _is_followed(leaves) and not _is_followed(outs) and _needs_values(flat, leaves):
            raise NotDifferentiableError(
                "its result is made of values that autograd does not follow (.item(), float(x), .numpy())",
                hint="Compute it by operations of torch, or give it jax.lax.stop_gradient of its arguments",
            ).of(flat.name)
        return outs, structure

    return run


def _is_followed(xs: Leaves) -> bool:
    return any(x.requires_grad for x in xs) or torch_private.has_tangent(xs)


def _needs_values(flat: Flat, leaves: Leaves) -> bool:
    if any(map(torch_private.is_traced, leaves)):
        return False
    try:
        infer_torch(flat, tuple(map(aval_of, leaves)))
    except AbstractEvalError:
        return True
    except Exception:  # noqa: BLE001 - for another reason it can't be run here again
        return False
    return False


def jvp_by_forward_mode(flat: Flat, nonzero: Mask) -> FlatFn:
    """The derivative along tangents by torch's forward mode; raises where that follows what backward does not."""
    jvp = derive_jvp(flat, nonzero)

    def watched(*leaves: Leaf) -> tuple[Leaves, Static]:
        with _NoGradIsSeen() as seen:
            result = jvp(*leaves)
        if seen.no_grad:
            raise RuntimeError("forward mode follows what is computed under no_grad")
        return result

    return watched


class _NoGradIsSeen(TorchFunctionMode):
    """It lets everything pass: a generator that the collector closes in here may not see an error of ours."""

    no_grad = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.no_grad |= func is torch_private.set_grad_enabled and args == (False,)
        return func(*args, **(kwargs or {}))


def jvp_by_transposes(flat: Flat, nonzero: Mask) -> FlatFn:
    """The derivative along tangents as the transpose of the transpose: no kernel needs a rule of forward mode.

    It can be differentiated again where forward mode can't: torch's rules for what saves a factor or a statistic (LU,
    the mean and deviation of a norm) take that for a constant. The transpose is the adjoint with respect to the real
    inner product, so that of complex numbers it holds as it is.
    """
    count = len(nonzero)

    def jvp(*leaves: Leaf) -> tuple[Leaves, Static]:
        primals, tangents = leaves[:count], leaves[count:]
        outs, pull = TORCH.vjp(inexact_part(flat, primals, nonzero), *pick(primals, nonzero))
        gradients, push = TORCH.vjp(lambda *points: pull(points), *map(torch.ones_like, outs))
        moved = tuple(push(tangents))
        _refuse_lost(flat, outs, tangents, gradients, moved)
        return moved, NOTHING

    return jvp


def _refuse_lost(flat: Flat, outs: Leaves, tangents: Leaves, gradients: Leaves, moved: Leaves) -> None:
    """Raise where the transpose of a pull-back is none: some backward has lost its cotangent, or is not linear in it.

    `gradients` are those of cotangents that are all one. Their product with the tangents is what the moved tangents sum
    to, but for rounding: relative to them, or to the outputs, which is what is left where a derivative is zero.
    """
    every = (*tangents, *gradients, *moved)
    if any(x.is_complex() or torch_private.is_traced(x) for x in every):
        return
    products = [(t * g).to(torch.float64) for t, g in zip(tangents, gradients, strict=True)]
    wide, values = ([x.to(torch.float64) for x in xs] for xs in (moved, outs))
    eps = max(torch.finfo(x.dtype).eps for x in every)
    off = abs(sum(p.sum() for p in products) - sum(m.sum() for m in wide))
    size = sum(x.abs().sum() for x in (*products, *wide)) * max(1e-3, 32 * eps**0.5)
    size += sum(x.abs().sum() for x in values) * 4 * eps
    try:
        is_lost = bool(off > size)
    except RuntimeError:  # a batch of torch.func, which has no one value
        return
    if is_lost:
        raise NotDifferentiableError(
            "forward mode of an autograd.Function whose backward is not linear, or once_differentiable",
            hint="Give it a jvp, or write its backward in operations of torch",
        ).of(flat.name)


_Refuse: TypeAlias = Callable[[Leaves, Mask, Sequence[bool]], None]


def jvp_by_autograd(flat: Flat, nonzero: Mask, refuse_graphless: _Refuse) -> FlatFn:
    """The same by torch's own backward, for what `torch.func` does not take: an old-style autograd function."""
    count = len(nonzero)

    def jvp(*leaves: Leaf) -> tuple[Leaves, Static]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            primals, outs = _recorded(flat, leaves[:count], nonzero)
            outs = tuple(out for out in outs if TORCH.is_inexact(out))
            refuse_graphless(primals, _active(primals), [not out.requires_grad for out in outs])
            points = [torch.ones_like(out, requires_grad=True) for out in outs]
            grads = _gradients(outs, pick(primals, nonzero), points, create_graph=True)
            moved = _gradients(grads, points, leaves[count:], create_graph=again)
            _refuse_lost(flat, outs, leaves[count:], grads, moved)
        return tuple(moved), NOTHING

    return jvp


def vjp_by_autograd(flat: Flat, nonzero: Mask, present: Mask, refuse_graphless: _Refuse) -> FlatFn:
    """The transpose by torch's own backward."""
    count = len(nonzero)

    def vjp(*leaves: Leaf) -> tuple[Leaves, Static]:
        again, given = torch.is_grad_enabled(), iter(leaves[count:])
        with torch.enable_grad():
            primals, outs = _recorded(flat, leaves[:count], nonzero)
        lost = [p and not o.requires_grad for o, p in zip(outs, present, strict=True) if TORCH.is_inexact(o)]
        refuse_graphless(primals, _active(primals), lost)
        cotangents = [TORCH.conjugated(next(given)) if p else None for p in present]
        points = pick(primals, nonzero)
        pull = twice(lambda along: _gradients(outs, points, along, create_graph=again), leaves[:count], outs)
        return tuple(map(TORCH.conjugated, pull(cotangents))), NOTHING

    return vjp


def _recorded(flat: Flat, primals: Leaves, nonzero: Mask) -> tuple[Leaves, Leaves]:
    """The primals as autograd takes them, and the outputs; they may be part of a graph already."""
    primals = tuple(
        x if not active or x.requires_grad else torch_private.own_leaf(x.detach())
        for x, active in zip(primals, nonzero, strict=True)
    )
    return primals, flat.leaves(*[x.clone() for x in primals])


def _active(primals: Leaves) -> Mask:
    return tuple(x.requires_grad for x in primals)


def _gradients(outs: Sequence[Any], inputs: Sequence[Leaf], cotangents: Sequence[Any], *, create_graph: bool) -> Leaves:
    """Gradients, zero where there is none; a cotangent that is None is zero."""
    pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if c is not None and o.requires_grad]
    grads: Sequence[Any] = (None,) * len(inputs)
    if pairs:
        grads = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True, create_graph=create_graph
        )
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))


# --- batches ----------------------------------------------------------------------------------------------------------


def vmap_with(randomness: str) -> Callable[..., Any]:
    """`torch.func.vmap`, with each example drawing numbers of its own ("different") or all the same."""
    vmap: Any = torch.func.vmap  # typed as what its deprecated twin returns
    return lambda fn, in_axes: vmap(fn, in_dims=in_axes, randomness=randomness)


def loop(flat: Flat, in_axes: tuple[int | None, ...]) -> FlatFn:
    """The function called on one example after the other, each in memory of its own."""

    def looped(*leaves: Leaf) -> tuple[Leaves, Static]:
        size = next(leaf.shape[axis] for leaf, axis in zip(leaves, in_axes, strict=True) if axis is not None)
        rows: list[tuple[Leaves, Static]] = []
        for i in range(size):
            example = [x if axis is None else x.select(axis, i) for x, axis in zip(leaves, in_axes, strict=True)]
            rows.append(flat.fn(*[x.clone(memory_format=torch.contiguous_format) for x in example]))
        if not rows:
            raise AbstractEvalError("a loop over an empty batch has no outputs", hint="Use as_jax(vmap='auto')")
        return tuple(torch.stack(column) for column in zip(*(outs for outs, _ in rows), strict=True)), rows[0][1]

    return looped


# --- composite kernels ------------------------------------------------------------------------------------------------


def composite(fn: FlatFn, *, values: bool = False) -> FlatFn:
    """The function with its fused kernels (attention, recurrent layers, norms) taken apart, in this thread and call.

    The fused ones have no rule for forward mode, for a second derivative or for a batch, or a wrong one. Under any
    function mode torch leaves its fused encoder layer alone too. Where its values are asked, and not a derivative, what
    updates running statistics is left as it is.
    """

    def taken_apart(*leaves: Leaf) -> tuple[Leaves, Static]:
        with _Composite(_COMPOSITES if values else _COMPOSITES | _DERIVATIVES_ONLY):
            return fn(*leaves)

    return taken_apart


class _Composite(TorchFunctionMode):
    def __init__(self, rules: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run: Any = self.rules.get(func, func)
        if run is not _attention_with_projections:
            return run(*args, **(kwargs or {}))
        with self:  # made of others that are to be taken apart
            return run(*args, **(kwargs or {}))


def _attention(
    query: Leaf,
    key: Leaf,
    value: Leaf,
    attn_mask: Leaf | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Leaf:
    """Scaled dot-product attention, as torch's documentation writes it out."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None:  # a row that may look at nothing is zero, as torch has it
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def _lstm_cell(x: Leaf, state: Leaves, hidden_weights: Leaves) -> tuple[Leaf, Leaves]:
    h, c = state
    i, f, g, o = (x + F.linear(h, *hidden_weights[:2])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    if len(hidden_weights) > 2:
        h = F.linear(h, hidden_weights[2])  # the projection
    return h, (h, c)


def _gru_cell(x: Leaf, state: Leaves, hidden_weights: Leaves) -> tuple[Leaf, Leaves]:
    (h,) = state
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, *hidden_weights).chunk(3, -1)
    z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
    h = n + z * (h - n)
    return h, (h,)


def _rnn_cell(nonlinearity: Callable[[Leaf], Leaf]) -> Callable[..., tuple[Leaf, Leaves]]:
    def cell(x: Leaf, state: Leaves, hidden_weights: Leaves) -> tuple[Leaf, Leaves]:
        h = nonlinearity(x + F.linear(state[0], *hidden_weights))
        return h, (h,)

    return cell


def _recurrent(cell: Callable[..., tuple[Leaf, Leaves]], fused: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer of torch, step by step."""

    def layers(
        x: Leaf, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any, train: Any, *options: Any
    ) -> Any:
        if not options or isinstance(has_biases, list | tuple):  # packed sequences keep their kernel
            return fused(x, hx, params, has_biases, num_layers, dropout, train, *options)
        bidirectional, batch_first = options
        several = isinstance(hx, list | tuple)
        states, ways = tuple(hx) if several else (hx,), 2 if bidirectional else 1
        each = len(params) // (num_layers * ways)
        x = x.transpose(0, 1) if batch_first else x
        finals: list[Leaves] = []
        for layer in range(num_layers):
            outs: list[Leaf] = []
            for way in range(ways):
                index = layer * ways + way
                weights = params[index * each : (index + 1) * each]
                steps, final = _steps(cell, x, tuple(s[index] for s in states), weights, has_biases, reverse=way == 1)
                outs.append(steps)
                finals.append(final)
            x = torch.cat(outs, -1)
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout)
        x = x.transpose(0, 1) if batch_first else x
        return (x, *(torch.stack(state) for state in zip(*finals, strict=True)))

    return layers


def _steps(
    cell: Callable[..., tuple[Leaf, Leaves]], x: Leaf, state: Leaves, weights: Sequence[Leaf], has_biases: bool, *,
    reverse: bool,
) -> tuple[Leaf, Leaves]:  # fmt: skip
    """One layer in one direction."""
    wi, wh, *rest = weights
    bi, bh = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
    inputs = F.linear(x, wi, bi).unbind(0)
    outs: list[Leaf] = []
    for step in reversed(inputs) if reverse else inputs:
        out, state = cell(step, state, (wh, bh, *rest))
        outs.append(out)
    return torch.stack(outs[::-1] if reverse else outs), state


def _embedding_bag(
    indices: Leaf,
    weight: Leaf,
    offsets: Leaf | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Leaf | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Leaf:
    """Sums of embeddings; what is not one keeps its kernel."""
    if mode == "max" or max_norm is not None or padding_idx is not None or scale_grad_by_freq or sparse:
        return F.embedding_bag(
            indices, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is None:
        return rows.mean(1) if mode == "mean" else rows.sum(1)
    starts = offsets[:-1] if include_last_offset else offsets
    bags = torch.bucketize(torch.arange(len(indices), device=indices.device), starts, right=True) - 1
    sums = torch.zeros(len(starts), rows.size(-1), dtype=rows.dtype, device=rows.device).index_add(0, bags, rows)
    if mode == "sum":
        return sums
    counts = torch.zeros(len(starts), dtype=rows.dtype, device=rows.device).index_add(
        0, bags, torch.ones_like(rows[:, 0])
    )
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _normalised(x: Leaf, axes: Sequence[int], weight: Leaf | None, bias: Leaf | None, eps: float) -> Leaf:
    centred = x - x.mean(axes, keepdim=True)
    x = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(x, weight, bias)


def _affine(x: Leaf, weight: Leaf | None, bias: Leaf | None) -> Leaf:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    x: Leaf, shape: Sequence[int], weight: Leaf | None = None, bias: Leaf | None = None, eps: float = 1e-5, *_: Any
) -> Leaf:
    return _normalised(x, tuple(range(-len(shape), 0)), weight, bias, eps)


def _per_channel(x: Leaf, t: Leaf | None) -> Leaf | None:
    return None if t is None else t.reshape(-1, *(1,) * (x.dim() - 2))


def _batch_norm(
    x: Leaf,
    running_mean: Leaf | None,
    running_var: Leaf | None,
    weight: Leaf | None = None,
    bias: Leaf | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Leaf:
    """Running statistics are left as they are: of a derivative, only the output is asked."""
    del momentum
    weight, bias = _per_channel(x, weight), _per_channel(x, bias)
    if training or running_mean is None or running_var is None:
        return _normalised(x, (0, *range(2, x.dim())), weight, bias, eps)
    mean, variance = _per_channel(x, running_mean), _per_channel(x, running_var + eps)
    return _affine((x - mean) * torch.rsqrt(variance), weight, bias)  # type: ignore[arg-type]


def _instance_norm(
    x: Leaf,
    running_mean: Leaf | None = None,
    running_var: Leaf | None = None,
    weight: Leaf | None = None,
    bias: Leaf | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Leaf:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _normalised(x, tuple(range(2, x.dim())), _per_channel(x, weight), _per_channel(x, bias), eps)


def _weight_norm(v: Leaf, g: Leaf, dim: int = 0) -> Leaf:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _det(x: Leaf) -> Leaf:
    """Of a matrix that is not singular; torch's third derivative is not a number."""
    sign, logarithm = torch.linalg.slogdet(x)
    return sign * logarithm.exp()


def _of_torch(fn: Callable[..., Leaf]) -> Callable[..., Leaf]:
    """The rule of a function for its twin without a Python face, which takes one more option, of another library."""
    return lambda *args: fn(*args[:-1])


_attention_with_projections = torch_private.without_overrides(F.multi_head_attention_forward)
_COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention_with_projections,
    F.embedding_bag: _embedding_bag,
    torch.lstm: _recurrent(_lstm_cell, torch.lstm),
    torch.gru: _recurrent(_gru_cell, torch.gru),
    torch.rnn_tanh: _recurrent(_rnn_cell(torch.tanh), torch.rnn_tanh),
    torch.rnn_relu: _recurrent(_rnn_cell(torch.relu), torch.rnn_relu),
}
_DERIVATIVES_ONLY: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _of_torch(lambda x, w, b, m, v, *options: _batch_norm(x, m, v, w, b, *options)),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _of_torch(lambda x, w, b, m, v, *options: _instance_norm(x, m, v, w, b, *options)),
    torch_private.weight_norm: _weight_norm,
    torch.det: _det,
    torch.Tensor.det: _det,
    torch.linalg.det: _det,
}
