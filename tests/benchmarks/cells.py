"""The cells of the table: what is measured, against what, and how much more it may take."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import floors
import jax
import jax.numpy as jnp
import optax
import torch
from flax import linen
from harness import Row, allocated, count, extra, grown, kept, ratios
from torch import nn

from interop import (
    WrappedJaxFunction,
    as_jax,
    as_torch,
    differentiable,
    jax_to_torch,
    jittable,
    make_functional,
    torch_to_jax,
)
from interop._module_in_jax import ModuleFunction

torch.set_num_threads(1)
torch.manual_seed(0)

Cell = Callable[[], list[Row]]
CELLS: dict[str, Cell] = {}


def cell(name: str) -> Callable[[Callable[[str], list[Row]]], Cell]:
    """Register a function of the cell's name under that name."""

    def register(measure: Callable[[str], list[Row]]) -> Cell:
        CELLS[name] = lambda: measure(name)
        return CELLS[name]

    return register


# --- the function that small calls are measured with ------------------------------------------------------------------


def energy_in_jax(x: jax.Array, w: jax.Array) -> jax.Array:
    """So little arithmetic that the crossing is what takes the time."""
    return (jnp.tanh(x @ w) ** 2).sum()


def energy_in_torch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    return (torch.tanh(x @ w) ** 2).sum()


X, W = torch.randn(4, 3), torch.randn(3, 5)
X_JAX, W_JAX = torch_to_jax((X, W), copy=True)


# --- a JAX function in torch ------------------------------------------------------------------------------------------


@cell("as_torch call, no grad")
def as_torch_call(name: str) -> list[Row]:
    """Values alone."""
    ours, floor = as_torch(energy_in_jax), floors.jax_call(energy_in_jax)
    contestants = {"ours": lambda: ours(X, W), "floor": lambda: floor(X, W)}
    return ratios(name, contestants, {"floor": 1.2})


@cell("as_torch forward + backward")
def as_torch_gradient(name: str) -> list[Row]:
    """A gradient of two small arguments."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    ours, floor = differentiable(as_torch(energy_in_jax)), floors.jax_gradient(energy_in_jax)
    contestants = {
        "ours": lambda: torch.autograd.grad(ours(x, w), (x, w)),
        "floor": lambda: floor(X, W),
        "pure torch": lambda: torch.autograd.grad(energy_in_torch(x, w), (x, w)),
    }
    return ratios(name, contestants, {"floor": 1.9, "pure torch": 1.6})


@cell("as_torch forward + backward, 20-leaf dict")
def as_torch_tree(name: str) -> list[Row]:
    """A gradient of the weights and biases of ten layers."""
    params = {
        f"{kind}{i}": torch.randn(*shape) / 8 for i in range(10) for kind, shape in (("w", (64, 64)), ("b", (64,)))
    }
    params = {key: p.requires_grad_() for key, p in params.items()}
    leaves, detached, x = list(params.values()), [p.detach() for p in params.values()], torch.randn(16, 64)

    def dense(tanh: Any) -> Callable[[Any, Any], Any]:
        def network(params: Any, x: Any) -> Any:
            for i in range(10):
                x = tanh(x @ params[f"w{i}"] + params[f"b{i}"])
            return (x**2).sum()

        return network

    ours = differentiable(as_torch(dense(jnp.tanh)))
    floor = floors.jax_gradient(lambda x, *leaves: dense(jnp.tanh)(dict(zip(params, leaves, strict=True)), x))
    pure = dense(torch.tanh)
    contestants = {
        "ours": lambda: torch.autograd.grad(ours(params, x), leaves),
        "floor": lambda: floor(x, *detached),
        "pure torch": lambda: torch.autograd.grad(pure(params, x), leaves),
    }
    return ratios(name, contestants, {"floor": 1.25, "pure torch": 1.3})


@cell("torch.func.vmap of as_torch")
def as_torch_vmap(name: str) -> list[Row]:
    """A batch by torch's transform, against the batched function called directly, and a bare operation transformed."""
    xs = torch.randn(32, 4, 3)
    ours = torch.func.vmap(as_torch(energy_in_jax), in_dims=(0, None))
    direct = as_torch(jax.vmap(energy_in_jax, in_axes=(0, None)))
    bare = torch.func.vmap(floors.batched_op(energy_in_jax), in_dims=(0, None))
    contestants = {
        "ours": lambda: ours(xs, W),
        "called directly": lambda: direct(xs, W),
        "a bare operation": lambda: bare(xs, W),
    }
    return ratios(name, contestants, {"called directly": 3.0, "a bare operation": 1.0})


@cell("torch.func.vmap of as_torch against a Python loop")
def as_torch_vmap_loop(name: str) -> list[Row]:
    """A batch of 16 by torch's transform, against a call for each of them."""
    xs = torch.randn(16, 4, 3)
    call = as_torch(energy_in_jax)
    ours = torch.func.vmap(call, in_dims=(0, None))
    contestants = {"ours": lambda: ours(xs, W), "a loop": lambda: torch.stack([call(x, W) for x in xs])}
    torch.testing.assert_close(*[contestant() for contestant in contestants.values()])
    return ratios(name, contestants, {"a loop": 0.5})


@cell("as_torch in a compiled caller")
def as_torch_compiled(name: str) -> list[Row]:
    """The crossing as one node of a graph of torch, against a bare operation there, and the same called eagerly."""
    eager = differentiable(jittable(as_torch(energy_in_jax)))
    bare = floors.graph_op(energy_in_jax)
    compiled = torch.compile(lambda x, w: eager(x, w), fullgraph=True, backend="aot_eager")
    floor = torch.compile(lambda x, w: bare(x, w), fullgraph=True, backend="aot_eager")
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    calls = {
        "ours": lambda: compiled(X, W),
        "a bare operation": lambda: floor(X, W),
        "called eagerly": lambda: eager(X, W),
    }
    gradients = {
        "ours": lambda: torch.autograd.grad(compiled(x, w), (x, w)),
        "a bare operation": lambda: torch.autograd.grad(floor(x, w), (x, w)),
        "called eagerly": lambda: torch.autograd.grad(eager(x, w), (x, w)),
    }
    limits = {"a bare operation": 1.35, "called eagerly": 4.0}
    return [*ratios(name, calls, limits), *ratios(f"{name}, forward + backward", gradients, limits)]


MLP = {"w0": (64, 256), "b0": (256,), "w1": (256, 256), "b1": (256,), "w2": (256, 10), "b2": (10,)}


def mlp_loss(activation: Any) -> Callable[[Any, Any, Any], Any]:
    """The squared error of three dense layers, in the framework of the activation."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        x = activation(x @ params["w0"] + params["b0"])
        x = activation(x @ params["w1"] + params["b1"])
        return ((x @ params["w2"] + params["b2"] - y) ** 2).mean()

    return loss


def mlp_values() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Parameters that require grad, and a batch that a crossing is small beside: inputs and targets."""
    params = {key: (torch.randn(*shape) / shape[0] ** 0.5).requires_grad_() for key, shape in MLP.items()}
    return params, torch.randn(4096, 64), torch.randn(4096, 10)


@cell("as_torch MLP at batch 4096, forward + backward")
def as_torch_mlp(name: str) -> list[Row]:
    """Loss and gradients of all parameters, against the same in JAX alone."""
    params, x, y = values = mlp_values()
    arrays = torch_to_jax(values, copy=True)
    loss, own = differentiable(as_torch(mlp_loss(jnp.tanh))), jax.jit(jax.value_and_grad(mlp_loss(jnp.tanh)))

    def ours() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = loss(params, x, y)
        return value.detach(), dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))

    contestants = {"ours": ours, "pure JAX": lambda: jax.block_until_ready(own(*arrays))}
    torch.testing.assert_close(ours(), jax_to_torch(own(*arrays)))
    return ratios(name, contestants, {"pure JAX": 1.1})


SIZES = (1, 16, 256, 4096)


def sized(size: object) -> str:
    """The name of a cell of this many examples."""
    return f"as_torch MLP, forward + backward, examples: {size}"


def as_torch_of_size(size: int) -> Cell:
    """The same from one example on, beside both frameworks: where the crossing is all there is, and where it vanishes."""

    @cell(sized(size))
    def measure(name: str) -> list[Row]:
        params, x, y = mlp_values()
        x, y, own = x[:size].clone(), y[:size].clone(), mlp_loss(torch.tanh)
        arrays = torch_to_jax((params, x, y), copy=True)
        loss, alone = differentiable(as_torch(mlp_loss(jnp.tanh))), jax.jit(jax.value_and_grad(mlp_loss(jnp.tanh)))
        contestants = {
            "ours": lambda: torch.autograd.grad(loss(params, x, y), list(params.values())),
            "pure torch": lambda: torch.autograd.grad(own(params, x, y), list(params.values())),
            "pure JAX": lambda: jax.block_until_ready(alone(*arrays)),
        }
        return ratios(name, contestants, {"pure torch": math.inf, "pure JAX": math.inf})

    return measure


for _size in SIZES:
    as_torch_of_size(_size)


@cell("memory kept between forward and backward, MLP")
def as_torch_memory(name: str) -> list[Row]:
    """What the graph holds on to at batch 4096, beside parameters and inputs, against what torch's own does."""
    rows = []
    for activation, in_jax, in_torch in (("tanh", jnp.tanh, torch.tanh), ("relu", jax.nn.relu, torch.relu)):
        values = mlp_values()
        losses = {"ours": differentiable(as_torch(mlp_loss(in_jax))), "pure torch": mlp_loss(in_torch)}
        held = {who: _held_by_graph(loss, values) for who, loss in losses.items()}
        rows.append(kept(f"{name}, {activation}", held["ours"], "pure torch", held["pure torch"], 1.2))
    return rows


def _held_by_graph(loss: Callable[..., torch.Tensor], values: tuple[Any, ...]) -> int:
    """Bytes that are there after a forward and were not before, once a first one has compiled and warmed up."""
    loss(*values).backward(inputs=list(values[0].values()))
    before = allocated()
    graph = loss(*values)  # noqa: F841 - alive while it is measured
    return allocated() - before


# --- a torch function in JAX ------------------------------------------------------------------------------------------


@cell("as_jax eager call")
def as_jax_call(name: str) -> list[Row]:
    """Values alone."""
    ours = as_jax(energy_in_torch)
    floor, careful = floors.torch_call(energy_in_torch), floors.careful_call(energy_in_torch)
    contestants = {
        "ours": lambda: ours(X_JAX, W_JAX),
        "floor": lambda: floor(X_JAX, W_JAX),
        "with what we promise": lambda: careful(X_JAX, W_JAX),
    }
    return ratios(name, contestants, {"floor": 1.2, "with what we promise": 1.15})


@cell("as_jax under jit")
def as_jax_jit(name: str) -> list[Row]:
    """In a compiled program."""
    ours = jax.jit(jittable(as_jax(energy_in_torch)))
    out = jax.ShapeDtypeStruct((), jnp.float32)
    floor, careful = floors.torch_callback(energy_in_torch, out), floors.careful_callback(energy_in_torch, out)
    contestants = {
        "ours": lambda: ours(X_JAX, W_JAX).block_until_ready(),
        "bare buffer_callback": lambda: floor(X_JAX, W_JAX).block_until_ready(),
        "with what we promise": lambda: careful(X_JAX, W_JAX).block_until_ready(),
    }
    return ratios(name, contestants, {"bare buffer_callback": 1.15, "with what we promise": 1.15})


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input and what the convolutions make of it."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def network_rows(name: str, net: nn.Module, x: torch.Tensor, limit: float) -> list[Row]:
    """The compiled gradient of a module in its parameters, against the module's own in torch."""
    params, own = torch_to_jax((dict(net.named_parameters()), x), copy=True), list(net.parameters())

    @jittable
    @differentiable
    @as_jax
    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(net, params, (x,)) ** 2).mean()

    ours = jax.jit(jax.grad(loss))
    contestants = {
        "ours": lambda: jax.block_until_ready(ours(*params)),
        "pure torch": lambda: torch.autograd.grad((net(x) ** 2).mean(), own),
    }
    return ratios(name, contestants, {"pure torch": limit})


@cell("as_jax jit gradient, MLP")
def as_jax_mlp(name: str) -> list[Row]:
    """Three dense layers."""
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)]
    return network_rows(name, nn.Sequential(*layers), torch.randn(32, 64), 1.2)


@cell("as_jax jit gradient, ResNet")
def as_jax_resnet(name: str) -> list[Row]:
    """Three residual blocks."""
    blocks = [Residual(16) for _ in range(3)]
    return network_rows(name, nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks), torch.randn(8, 3, 16, 16), 1.2)


@cell("as_jax jit gradient, transformer")
def as_jax_transformer(name: str) -> list[Row]:
    """Two layers of attention."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return network_rows(name, net, torch.randn(8, 16, 32), 1.2)


class LastOutput(nn.Module):
    """What an LSTM says at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the last step."""
        return self.lstm(x)[0][:, -1]


@cell("as_jax jit gradient, LSTM")
def as_jax_lstm(name: str) -> list[Row]:
    """A recurrent layer."""
    return network_rows(name, LastOutput(), torch.randn(8, 12, 16), 2.0)


# --- training from the other framework --------------------------------------------------------------------------------


def small_resnet() -> nn.Module:
    """Three residual blocks and a head."""
    blocks = [Residual(16) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(16 * 16 * 16, 10))


def four_layers() -> nn.Module:
    """Four layers of attention and a head."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(64, 10))


def torch_training_rows(name: str, net: nn.Module, x: torch.Tensor) -> list[Row]:
    """A step of Adam on a torch module in a compiled program of JAX, against torch's own step."""
    apply, params = make_functional(net)
    optimizer = optax.adam(1e-4)
    x_jax = torch_to_jax(x, copy=True)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(lambda params: (apply(params, x_jax) ** 2).mean())(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    now = [params, optimizer.init(params)]
    native = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def ours() -> None:
        now[:] = jax.block_until_ready(step(*now))

    def pure_torch() -> None:
        native.zero_grad()
        (net(x) ** 2).mean().backward()
        native.step()

    return ratios(name, {"ours": ours, "pure torch": pure_torch}, {"pure torch": 1.15})


def jax_training_rows(name: str, model: linen.Module, x: torch.Tensor) -> list[Row]:
    """A step of torch's Adam on a JAX model, against a compiled step of JAX's own.

    And against the same in pieces: where torch computes the loss, it asks for the value of the model and for the
    gradient one after the other, and the compiler sees less of two programs than of one. A loss in JAX is one program.
    And against the same by hand: programs of JAX between conversions, gradients put where the optimizer finds them.
    """
    x_jax = torch_to_jax(x, copy=True)
    variables = model.init(jax.random.key(0), x_jax)

    def loss_in_jax(variables: Any, x: jax.Array) -> jax.Array:
        return (model.apply(variables, x) ** 2).mean()

    module, whole = WrappedJaxFunction(model, variables), WrappedJaxFunction(loss_in_jax, variables)
    optimizer, of_whole = (torch.optim.Adam(m.parameters(), 1e-4, fused=True) for m in (module, whole))
    native = optax.adam(1e-4)

    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = native.update(gradients, state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        return update(params, state, jax.grad(loss_in_jax)(params, x_jax))

    forward = jax.jit(lambda params: jax.vjp(lambda params: model.apply(params, x_jax), params))
    loss = jax.jit(jax.value_and_grad(lambda out: (out**2).mean()))
    backward, updated = jax.jit(lambda pull, cotangent: pull(cotangent)[0]), jax.jit(update)
    now = [variables, native.init(variables)]
    in_pieces = [variables, native.init(variables)]

    def ours() -> None:
        optimizer.zero_grad()
        (module(x) ** 2).mean().backward()
        optimizer.step()

    def ours_with_loss() -> None:
        of_whole.zero_grad()
        whole(x).backward()
        of_whole.step()

    def pure_jax() -> None:
        now[:] = jax.block_until_ready(step(*now))

    def pure_jax_in_pieces() -> None:
        out, pull = forward(in_pieces[0])
        in_pieces[:] = jax.block_until_ready(updated(*in_pieces, backward(pull, loss(out)[1])))

    by_hand, by_hand_with_loss = (
        floors.training_step(model.apply, variables, x_jax, loss_in_jax=in_jax) for in_jax in (False, True)
    )
    contestants = {"ours": ours, "pure JAX": pure_jax, "pure JAX in pieces": pure_jax_in_pieces, "by hand": by_hand}
    with_loss = {"ours": ours_with_loss, "pure JAX": pure_jax, "by hand": by_hand_with_loss}
    return [
        *ratios(f"{name}, loss in torch", contestants, {"pure JAX": 1.15, "pure JAX in pieces": 1.15, "by hand": 1.1}),
        *ratios(f"{name}, loss in JAX", with_loss, {"pure JAX": 1.15, "by hand": 1.1}),
    ]


class ResidualInJax(linen.Module):
    """Two convolutions around a shortcut."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The input and what the convolutions make of it."""
        h = linen.relu(linen.Conv(16, (3, 3))(x))
        return linen.relu(x + linen.Conv(16, (3, 3))(h))


class ResNetInJax(linen.Module):
    """Three residual blocks and a head."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = linen.Conv(16, (3, 3))(x)
        for _ in range(3):
            x = ResidualInJax()(x)
        return linen.Dense(10)(x.reshape(x.shape[0], -1))


class FourLayersInJax(linen.Module):
    """Four layers of attention and a head."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of each token."""
        for _ in range(4):
            x = linen.LayerNorm()(x + linen.MultiHeadDotProductAttention(4)(x))
            x = linen.LayerNorm()(x + linen.Dense(64)(linen.relu(linen.Dense(128)(x))))
        return linen.Dense(10)(x)


@cell("training step from JAX, ResNet")
def train_torch_resnet(name: str) -> list[Row]:
    """Convolutions."""
    return torch_training_rows(name, small_resnet(), torch.randn(16, 3, 16, 16))


@cell("training step from JAX, transformer")
def train_torch_transformer(name: str) -> list[Row]:
    """Attention."""
    return torch_training_rows(name, four_layers(), torch.randn(16, 32, 64))


@cell("training step from torch, ResNet")
def train_jax_resnet(name: str) -> list[Row]:
    """Convolutions."""
    return jax_training_rows(name, ResNetInJax(), torch.randn(16, 16, 16, 3))


@cell("training step from torch, transformer")
def train_jax_transformer(name: str) -> list[Row]:
    """Attention."""
    return jax_training_rows(name, FourLayersInJax(), torch.randn(16, 32, 64))


@cell("a call on given parameters, 100 modules")
def skeleton(name: str) -> list[Row]:
    """A module renewed for the call, against one whose tensors are swapped."""
    net = nn.Sequential(*[module for _ in range(50) for module in (nn.Linear(64, 64), nn.Tanh())])
    params, x = {name: p.detach().clone() for name, p in net.named_parameters()}, torch.randn(16, 64)
    ours = torch.no_grad()(ModuleFunction(net))
    theirs = torch.no_grad()(torch.func.functional_call)
    contestants = {"ours": lambda: ours(params, x), "functional_call": lambda: theirs(net, params, (x,))}
    return ratios(name, contestants, {"functional_call": 1.15})


@cell("as_jax eager gradient")
def as_jax_gradient(name: str) -> list[Row]:
    """Against what JAX takes for the gradient of a function of one operation: its own rules are the floor."""
    ours = differentiable(as_jax(energy_in_torch))
    contestants = {
        "ours": lambda: jax.block_until_ready(jax.grad(ours)(X_JAX, W_JAX)),
        "jax.vjp of tanh": lambda: jax.block_until_ready(jax.vjp(jax.lax.tanh, X_JAX)[1](X_JAX)),
    }
    return ratios(name, contestants, {"jax.vjp of tanh": 1.5})


@cell("as_jax jitted vmap of gradient")
def as_jax_batch(name: str) -> list[Row]:
    """A batch of gradients, against one compiled gradient after the other."""
    gradient = jax.grad(jittable(differentiable(as_jax(energy_in_torch))))
    batch, one = jax.random.normal(jax.random.key(0), (16, *X_JAX.shape)), jax.jit(gradient)
    batched, rows = jax.jit(jax.vmap(gradient, in_axes=(0, None))), list(batch)
    contestants = {
        "ours": lambda: jax.block_until_ready(batched(batch, W_JAX)),
        "a loop": lambda: jax.block_until_ready([one(row, W_JAX) for row in rows]),
    }
    return ratios(name, contestants, {"a loop": 0.5})


@cell("as_jax in a scan of 1000 steps")
def as_jax_scan(name: str) -> list[Row]:
    """What one step takes more than a step of `buffer_callback`."""

    def steps(step: Callable[..., jax.Array]) -> Callable[[], Any]:
        scanned = jax.jit(lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, None, length=1000)[0])
        return lambda: scanned(X_JAX).block_until_ready()

    floor = floors.torch_callback(torch.tanh, jax.ShapeDtypeStruct(X_JAX.shape, jnp.float32))
    contestants = {"ours": steps(jittable(as_jax(torch.tanh))), "bare buffer_callback": steps(floor)}
    return ratios(name, contestants, {"bare buffer_callback": 1.5}, per=1000)


@cell("memory of as_jax")
def as_jax_memory(name: str) -> list[Row]:
    """What is left of many calls, after as many that warm up."""
    compiled = jax.jit(jittable(as_jax(energy_in_torch)))
    gradient = jax.grad(differentiable(as_jax(energy_in_torch)))

    def retrace(i: int) -> Any:
        return jax.jit(jax.grad(jittable(differentiable(as_jax(lambda x: (x * i).sum())))))(X_JAX)

    loops = {
        "20,000 compiled calls": (20_000, 2e6, lambda _: compiled(X_JAX, W_JAX)),
        "1,500 eager gradients": (1_500, 2e6, lambda _: gradient(X_JAX, W_JAX)),
        "300 new functions": (300, 40e6, retrace),
    }
    return [grown(name, what, *loop) for what, loop in loops.items()]


# --- values -----------------------------------------------------------------------------------------------------------


@cell("conversion, 64 MB against 4 kB")
def conversion(name: str) -> list[Row]:
    """No byte is copied, so the size does not matter."""
    small, large = torch.randn(1024), torch.randn(16 * 2**20)
    rows = []
    for direction, convert, values in (
        ("to JAX", torch_to_jax, (small, large)),
        ("to torch", jax_to_torch, torch_to_jax((small, large), copy=True)),
    ):
        contestants = {"ours": _converting(convert, values[1]), "4 kB": _converting(convert, values[0])}
        rows += ratios(f"{name}, {direction}", contestants, {"4 kB": 1.15})
    return rows


def _converting(convert: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    return lambda: convert(value)


@cell("per leaf of a dict")
def leaves(name: str) -> list[Row]:
    """Linear in their number."""
    rows = []
    for n in (1, 10, 100, 1000):
        params = {f"p{i}": torch.randn(3) for i in range(n)}
        rows += ratios(f"{name} of {n}", _with_leaves(params), {"floor": 1.2}, per=n)
    return rows


def _with_leaves(params: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    def doubled(tensors: Sequence[Any]) -> list[Any]:
        return [2 * t for t in tensors]

    ours = as_torch(lambda params: dict(zip(params, doubled(params.values()), strict=True)))
    jitted = jax.jit(doubled)

    def floor() -> dict[str, torch.Tensor]:
        outs = jitted([floors.to_jax(t) for t in params.values()])
        return dict(zip(params, map(floors.to_torch, outs), strict=True))

    return {"ours": lambda: ours(params), "floor": floor}


# --- once per process, or per function --------------------------------------------------------------------------------


@cell("import interop")
def importing(name: str) -> list[Row]:
    """On top of the frameworks."""
    timed = "import time; start = time.perf_counter(); import torch, jax{}; print(time.perf_counter() - start)"
    return extra(name, timed.format(", interop"), timed.format(""), 0.05)


FIRST_CALL = """
    import time, torch, jax, jax.numpy as jnp
    from interop import as_jax, as_torch, differentiable, jittable
    x = torch.randn(3) if {torch} else jnp.ones(3)
    jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()  # the backend runs
    {before}
    start = time.perf_counter()
    {call}
    print(time.perf_counter() - start)
"""


def first(call: str, *, host_is_torch: bool, before: str = "pass") -> str:
    """A program that times a first call."""
    return textwrap.dedent(FIRST_CALL).format(call=call, torch=host_is_torch, before=before)


@cell("first as_torch call")
def first_call(name: str) -> list[Row]:
    """Against `jax.jit` of the same function."""
    ours = first("as_torch(lambda x: jnp.sin(x) * 2)(x)", host_is_torch=True)
    return extra(
        name, ours, first("jax.jit(lambda x: jnp.sin(x) * 2)(x).block_until_ready()", host_is_torch=False), 0.05
    )


@cell("first as_jax jit gradient")
def first_gradient(name: str) -> list[Row]:
    """Against `jax.jit`, with torch's tracer loaded; against `torch.compile`, which has to load it too."""
    torch_fn = "lambda x: (torch.sin(x) * 2).sum()"
    ours = f"jax.block_until_ready(jax.jit(jax.grad(jittable(differentiable(as_jax({torch_fn})))))(x))"
    jitted = "jax.block_until_ready(jax.jit(jax.grad(lambda x: (jnp.sin(x) * 2).sum()))(x))"
    compiled = f"torch.compile({torch_fn}, backend='aot_eager')(x.requires_grad_()).backward()"
    tracer = "import torch._dynamo, torch.fx.experimental.proxy_tensor, torch._functorch.aot_autograd"
    return [
        *extra(
            f"{name}, tracer loaded",
            first(ours, host_is_torch=False, before=tracer),
            first(jitted, host_is_torch=False, before=tracer),
            0.3,
            rounds=5,
        ),
        *extra(
            f"{name}, not loaded",
            first(ours, host_is_torch=False),
            first(compiled, host_is_torch=True),
            0.0,
            rounds=5,
        ),
    ]


@cell("retraces of as_torch")
def retraces(name: str) -> list[Row]:
    """How often the function is traced."""
    traced: list[int] = []

    @as_torch
    def fn(x: jax.Array, scale: float) -> jax.Array:
        traced.append(1)
        return x * scale

    def traces(*calls: tuple[torch.Tensor, float]) -> int:
        before = len(traced)
        for arguments in calls:
            fn(*arguments)
        return len(traced) - before

    return [
        count(name, "for a first call", traces((torch.ones(3), 1.0)), 1),
        count(name, "for the same shapes", traces(*[(torch.zeros(3), 1.0)] * 10), 0),
        count(name, "for ten other floats", traces(*[(torch.zeros(3), 1.5 + i) for i in range(10)]), 0),
        count(name, "for a new shape", traces(*[(torch.zeros(4), 1.0)] * 10), 1),
    ]
