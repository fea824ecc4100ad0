"""What a crossing can't be cheaper than: the same calls by hand, with no checks, no pytrees and no autograd."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.experimental.buffer_callback import buffer_callback
from jaxlib import _jax

_CPU = jax.devices("cpu")[0]


def to_jax(t: torch.Tensor) -> jax.Array:
    """A tensor's memory as an array."""
    return _jax.dlpack_managed_tensor_to_buffer(torch._C._to_dlpack(t), _CPU, None)


def to_torch(a: jax.Array) -> torch.Tensor:
    """An array's memory as a tensor."""
    return torch._C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(a, None))


def jax_call(fn: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A JAX function on tensors: import, the compiled function, export."""
    jitted = jax.jit(fn)
    return lambda *tensors: to_torch(jitted(*[to_jax(t) for t in tensors]))


def jax_gradient(fn: Callable[..., Any]) -> Callable[..., list[torch.Tensor]]:
    """Forward and backward of a JAX function of a flat list of tensors, the residuals staying in JAX between them."""
    treedef: list[Any] = []

    @jax.jit
    def forward(*arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        out, pull = jax.vjp(fn, *arrays)
        residuals, tree = jax.tree.flatten(pull)
        treedef[:] = [tree]
        return out, residuals

    @jax.jit
    def backward(residuals: list[jax.Array], cotangent: jax.Array) -> Sequence[jax.Array]:
        return jax.tree.unflatten(treedef[0], residuals)(cotangent)

    def both(*tensors: torch.Tensor) -> list[torch.Tensor]:
        out, residuals = forward(*[to_jax(t) for t in tensors])
        cotangent = torch.ones_like(to_torch(out))
        return [to_torch(g) for g in backward(residuals, to_jax(cotangent))]

    return both


def training_step(
    model: Callable[[Any, jax.Array], jax.Array], variables: Any, x: jax.Array, *, loss_in_jax: bool
) -> Callable[[], None]:
    """A step of torch's Adam on a JAX model, without a module and without autograd through it."""
    leaves, treedef = jax.tree.flatten(variables)
    parameters = [torch.nn.Parameter(to_torch(leaf).clone()) for leaf in leaves]
    optimizer = torch.optim.Adam(parameters, 1e-4, fused=True)

    def of_leaves(leaves: list[jax.Array]) -> jax.Array:
        out = model(jax.tree.unflatten(treedef, leaves), x)
        return (out**2).mean() if loss_in_jax else out

    value_and_gradients = jax.jit(jax.value_and_grad(of_leaves))
    forward, backward = jax.jit(lambda leaves: jax.vjp(of_leaves, leaves)), jax.jit(lambda pull, c: pull(c)[0])

    def step() -> None:
        arrays = [to_jax(p.detach()) for p in parameters]
        if loss_in_jax:
            value, gradients = value_and_gradients(arrays)
            to_torch(value)
        else:
            value, pull = forward(arrays)
            out = to_torch(value).requires_grad_()
            (out**2).mean().backward()
            gradients = backward(pull, to_jax(out.grad))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = to_torch(gradient)
        optimizer.step()

    return step


_LIBRARY = torch.library.Library("floor", "DEF")


def graph_op(fn: Callable[..., jax.Array]) -> Callable[..., torch.Tensor]:
    """A JAX function of two tensors to a number, as an operation that torch's compiler takes as it is."""
    value, pull = jax_call(fn), jax.jit(lambda x, w, c: jax.vjp(fn, x, w)[1](c))

    def gradient(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        return [to_torch(g) for g in pull(to_jax(x), to_jax(w), to_jax(c))]

    _LIBRARY.define("value(Tensor x, Tensor w) -> Tensor")
    _LIBRARY.define("gradient(Tensor x, Tensor w, Tensor c) -> Tensor[]")
    _LIBRARY.impl("value", value, "CompositeExplicitAutograd")
    _LIBRARY.impl("gradient", gradient, "CompositeExplicitAutograd")
    torch.library.register_fake("floor::value", lambda x, w: x.new_empty(()), lib=_LIBRARY)  # noqa: ARG005
    torch.library.register_fake(
        "floor::gradient",
        lambda x, w, c: [torch.empty_like(x), torch.empty_like(w)],
        lib=_LIBRARY,  # noqa: ARG005
    )

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return torch.ops.floor.value(x, w)

        @staticmethod
        def backward(ctx: Any, c: torch.Tensor) -> Any:
            return tuple(torch.ops.floor.gradient(*ctx.saved_tensors, c))

    return lambda x, w: Op.apply(x, w)


def batched_op(fn: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A JAX function of two tensors as an operation of torch's autograd that has a rule for batches of the first."""
    one, many = jax_call(fn), jax_call(jax.vmap(fn, in_axes=(0, None)))

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return one(x, w)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def vmap(_info: Any, _in_dims: Any, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, int]:
            return many(x, w), 0

    return lambda x, w: Op.apply(x, w)


def torch_call(fn: Callable[..., torch.Tensor]) -> Callable[..., jax.Array]:
    """A torch function on arrays: export, the function, import."""

    def call(*arrays: jax.Array) -> jax.Array:
        with torch.no_grad():
            return to_jax(fn(*[to_torch(a) for a in arrays]))

    return call


def careful_call(fn: Callable[..., torch.Tensor]) -> Callable[..., jax.Array]:
    """The same with what a crossing promises: the function may write to its arguments, and return one of them."""

    def call(*arrays: jax.Array) -> jax.Array:
        with torch.no_grad():
            computed = fn(*[to_torch(a).clone() for a in arrays])
            if computed._is_view() or computed.requires_grad or not computed.is_contiguous():
                raise AssertionError
            return to_jax(computed)

    return call


def torch_callback(fn: Callable[..., torch.Tensor], out: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    """A torch function in a compiled program: one callback, whose result is written where JAX wants it."""

    def callback(_context: Any, result: Any, *buffers: Any) -> None:
        with torch.no_grad():
            computed = fn(*[torch._C._from_dlpack(b.__dlpack__()) for b in buffers])
            torch._C._from_dlpack(result.__dlpack__()).copy_(computed)

    return jax.jit(buffer_callback(callback, out))


_TURNS = threading.RLock()


def careful_callback(fn: Callable[..., torch.Tensor], out: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    """The same with what a crossing promises: copies, one at a time, and modes, shape and dtype as they should be."""

    def modes() -> tuple[Any, ...]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()

    traced = modes()

    def callback(_context: Any, result: Any, *buffers: Any) -> None:
        if modes() != traced or torch._C._is_any_autocast_enabled() or torch._C._len_torch_function_stack():
            raise AssertionError
        with _TURNS:
            computed = fn(*[torch.from_numpy(b.__array__().copy()) for b in buffers])
        place = torch._C._from_dlpack(result.__dlpack__())
        if computed.shape != place.shape or computed.dtype is not place.dtype or modes() != traced:
            raise AssertionError
        place.copy_(computed)

    return jax.jit(buffer_callback(callback, out))
