"""One table of torch models as they are in the wild, small: what every test of real models runs over.

Weights are random, the same in every run. Inputs are numpy arrays, which a test turns into leaves of its framework;
`statics` are keyword arguments that stay as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, eq=False)
class Model:
    """A module with inputs.

    Attributes:
        id: its name in test reports.
        make: the module, in the mode (train or eval) that it is to be used in.
        args: positional inputs.
        named: inputs by keyword.
        statics: keyword arguments that are no arrays.
        mutable: whether it updates its buffers.
        traceable: whether torch can trace it without its values.
        tolerance: relative to the largest number of an array.
        orders: up to which derivative torch itself has rules, forwards and backwards; differences stand in for more.
    """

    id: str
    make: Callable[[], nn.Module]
    args: tuple[np.ndarray[Any, Any], ...] = ()
    named: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    statics: dict[str, Any] = field(default_factory=dict)
    mutable: bool = False
    traceable: bool = True
    tolerance: float = 2e-5
    orders: tuple[int, int] = (1, 2)

    def module(self) -> nn.Module:
        """A new module; its weights are those of every other."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Other weights than the module's own, by name; a tied one is there once."""
        return {
            name: (p.detach() * 1.25 + 0.1 * torch.cos(torch.arange(p.numel()).reshape(p.shape))).numpy()
            for name, p in self.module().named_parameters()
        }

    @property
    def inputs(self) -> list[np.ndarray[Any, Any]]:
        """The arrays of a call beside the parameters."""
        return [*self.args, *self.named.values()]

    def call(self, fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Any:
        """Call a function of parameters and inputs on these."""
        count = len(self.args)
        return fn(params, *inputs[:count], **dict(zip(self.named, inputs[count:], strict=True)), **self.statics)


def _floats(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def _tokens(*shape: int, below: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(shape).integers(1, below, shape).astype(np.int32)


# --- networks ---------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8))
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)
        for buffer in self.buffers():  # as after some training: not the identity
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(images))
        x = F.silu(x + self.first(x))
        x = F.silu(self.shortcut(x) + self.second(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """A block of causal attention by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).reshape(batch, length, 8))


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(10, 4, mode="sum"), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.bag(ids, per_sample_weights=weights)))


class Experts(nn.Module):
    """Each row goes to its two best experts. All shapes are known: every expert sees every row."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        taken = every.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
        return (taken * gates[..., None]).sum(1), chosen


class DispatchedExperts(Experts):
    """The same; an expert sees its own rows alone, as many as there are."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == number)
            out.index_add_(0, rows, expert(x[rows]) * gates[rows, slots, None])
        return out, chosen


class FourierBlock(nn.Module):
    """A block of a Fourier neural operator: complex weights on the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Parameter(torch.randn(3, 3, 4, dtype=torch.complex64) / 3)
        self.pointwise = nn.Conv1d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.fft.rfft(x)[..., :4]
        mixed = torch.einsum("bik,iok->bok", low, self.spectral)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.pointwise(x)), mixed


class GaussianProcess(nn.Module):
    """Negative log likelihood of the data, once by the Cholesky factor and once by solve and logdet; and the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.log_length, self.log_noise = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        square = ((x[:, None] - x[None, :]) / self.log_length.exp()).pow(2).sum(-1)
        k = torch.exp(-square / 2) + self.log_noise.exp() * torch.eye(len(x), dtype=x.dtype)
        factor = torch.linalg.cholesky(k)
        white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        by_factor = white.square().sum() / 2 + factor.diagonal().log().sum() + len(x) * math.log(2 * math.pi) / 2
        weights = torch.linalg.solve(k, y)
        by_solve = (y @ weights + torch.logdet(k)) / 2
        return by_factor, by_solve, weights


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.block, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = checkpoint(lambda h: torch.sin(self.block(h)) * h, hidden, use_reentrant=self.reentrant)
        return self.last(hidden)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = F.gelu(self.first(x))
            return self.last(self.norm(hidden)), hidden.float().logsumexp(-1)


class Tied(nn.Module):
    """One module under two names, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Linear(4, 4)
        self.last.weight = self.middle.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.middle(torch.tanh(self.first(x)))))))


def weight_normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Tanh())


def _gated(x: torch.Tensor, gate: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        x = torch.tanh(x * torch.sigmoid(gate)) + x
    return x


class Scripted(nn.Module):
    """A function of TorchScript between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(3, 4), nn.Linear(3, 4)
        self.gated = torch.jit.script(_gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gated(self.first(x), self.gate(x), 2)


def compiled() -> nn.Module:
    return torch.compile(mlp(), backend="aot_eager")  # a compiler that takes no C++ compiler


class WithCompiledPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.activation = torch.compile(lambda x: F.silu(x) * torch.sin(x), backend="aot_eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x)))


# --- modules that refer to their parts by other ways than attributes --------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class InList(Two):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [self.a, self.b]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


class InDict(Two):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"tanh": self.a, "relu": self.b}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, part in self.parts.items():
            x = getattr(torch, name)(part(x))
        return x


class BoundMethod(Two):
    def __init__(self) -> None:
        super().__init__()
        self.run = self.b_of_a

    def b_of_a(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class Closure(Two):
    def __init__(self) -> None:
        super().__init__()
        self.run = lambda x: self.b(torch.tanh(self.a(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class KnowsParent(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parents = [parent]  # in a list, where torch does not look for submodules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.parents[0].a.weight


class Parent(Two):
    def __init__(self) -> None:
        super().__init__()
        self.child = KnowsParent(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(torch.tanh(self.a(x)))


class Hooked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, args, out: out * self.b.bias)


class ParametersInList(Two):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.a.weight, self.b.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weights[0]) @ self.weights[1]


def with_new_forward() -> nn.Module:
    """As libraries do that wrap the forward of a model."""
    module = Two()
    inner = module.forward
    module.forward = lambda x: 2 * inner(x)
    return module


def with_partial_forward() -> nn.Module:
    module = Two()
    module.forward = functools.partial(Two.forward, module)
    return module


def compiled_in_place() -> nn.Module:
    module = Two()
    module.compile(backend="eager")
    return module


def with_compiled_child() -> nn.Module:
    module = Two()
    module.a = torch.compile(module.a, backend="eager")
    return module


def with_scripted_child() -> nn.Module:
    module = Two()
    module.a = torch.jit.script(module.a)
    return module


def traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(Two())


def exported() -> nn.Module:
    return torch.export.export(Two(), (torch.ones(3, 2),)).module()


def pruned() -> nn.Module:
    module = Two()
    prune.l1_unstructured(module.a, "weight", 0.5)
    return module


REFERRING: list[Model] = [
    Model(make.__name__, make, (_floats(3, 2),))
    for make in (
        InList, InDict, BoundMethod, Closure, Parent, Hooked, ParametersInList, with_new_forward, with_partial_forward,
        compiled_in_place, with_compiled_child, with_scripted_child, traced_by_fx, exported, pruned,
    )
]  # fmt: skip


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=2, hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=12,
    )  # fmt: skip
    return transformers.ViTModel(config).eval()


_NO_CACHE = {"use_cache": False}  # a cache is an object that can't leave torch
_PADDED = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)

MODELS: list[Model] = [
    Model("mlp", mlp, (_floats(5, 3),)),
    Model("resnet", lambda: ResNet().eval(), (_floats(3, 2, 6, 6),)),
    Model("resnet_in_training", ResNet, (_floats(3, 2, 6, 6),), mutable=True),
    Model("lstm", lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True), (_floats(2, 5, 3),)),
    Model("gru", lambda: nn.GRU(3, 4, batch_first=True, bidirectional=True), (_floats(2, 5, 3),)),
    Model("transformer_encoder", transformer_encoder, (_floats(2, 5, 8),)),
    Model("attention", Attention, (_floats(2, 5, 8),)),
    Model("embedding_bag", Bag, (_tokens(3, 4, below=10), _floats(3, 4)), orders=(0, 1)),
    Model("experts", Experts, (_floats(5, 4),)),
    Model("dispatched_experts", DispatchedExperts, (_floats(5, 4),), traceable=False),
    Model("fourier", FourierBlock, (_floats(2, 3, 8),)),
    Model("gaussian_process", GaussianProcess, (_floats(5, 2), _floats(5))),
    Model("checkpoint", lambda: Checkpointed(reentrant=False), (_floats(4, 3),)),
    Model("reentrant_checkpoint", lambda: Checkpointed(reentrant=True), (_floats(4, 3),), orders=(0, 1)),
    Model(
        "autocast", Autocast, (_floats(3, 4),), tolerance=3e-2
    ),  # torch's own second derivative is as far off in 8 bits
    Model("tied", Tied, (_floats(3, 4),)),
    Model("weight_norm", weight_normalised, (_floats(3, 2),), orders=(0, 1)),  # torch's own second derivative is wrong
    Model("scripted", Scripted, (_floats(2, 3),)),
    Model("compiled", compiled, (_floats(5, 3),), orders=(1, 1)),
    Model("compiled_part", WithCompiledPart, (_floats(5, 3),)),
    Model("gpt2", gpt2, (_tokens(2, 5),), statics=_NO_CACHE),
    Model("llama", llama, (_tokens(2, 5),), statics=_NO_CACHE),
    Model("bert", bert, named={"input_ids": _tokens(2, 5), "attention_mask": _PADDED}),
    Model("t5", t5, named={"input_ids": _tokens(2, 4), "decoder_input_ids": _tokens(2, 3)}, statics=_NO_CACHE),
    Model("vit", vit, named={"pixel_values": _floats(2, 2, 8, 8)}),
]

IDS = [model.id for model in MODELS]
BY_ID = dict(zip(IDS, MODELS, strict=True))
