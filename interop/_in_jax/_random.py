"""Random numbers of torch in a program of JAX: drawn from a key, or, without one, an effect of the program."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch.overrides import TorchFunctionMode

from interop._errors import UnsupportedError
from interop._private import jax as jax_private
from interop._threads import TAKING_TURNS

KEYED = "Give the crossing a key: as_jax(rng='key')"


class Draws(jax_private.Effect):
    """The effect of a function that draws from torch's generator: never merged with its twin, never left out."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"{self.name} draws random numbers from torch's generator. {KEYED}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draws) and other.name == self.name

    def __hash__(self) -> int:
        return hash((Draws, self.name))


jax_private.allow_effect(Draws)


def refused(name: str, where: str) -> UnsupportedError:
    """The error for a function that draws random numbers where each run has to draw the same."""
    return UnsupportedError(f"it draws random numbers, and {where}", hint=KEYED).of(name)


@contextlib.contextmanager
def seeding(key: torch.Tensor, *, watch: bool = True) -> Generator[None]:
    """Seed generators from a hash of a key's data, whatever its implementation; put back at the end.

    Those of torch, and under `watch` each of the function's own, when it is first drawn from.
    """
    # A batch of keys has no one value: `tolist` raises, and the batch is run as a loop.
    data: list[Any] = key.tolist()
    own = _Own(b"".join(int(word).to_bytes(4, "little") for word in data))
    with TAKING_TURNS:  # the generators belong to the process
        for generator in _generators():
            own.seed(generator, stream=0)
        try:
            with own if watch else contextlib.nullcontext():
                yield
        finally:
            for generator, state in own.before.items():
                generator.set_state(state)


class InOrder(TorchFunctionMode):
    """Numbers are drawn in the order of the elements, and not in that of the memory.

    A derivative, a batch and a captured graph of a function have their values in other layouts than a call of it, and
    have to draw the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and not args[0].is_contiguous():
            dense = torch.empty_like(args[0], memory_format=torch.contiguous_format)
            return args[0].copy_(func(dense, *args[1:], **kwargs))
        if func in _DRAWS and not all(map(_is_dense, (*args, *kwargs.values()))):
            place = _DRAWS[func]
            writes = kwargs.get("inplace") or args[place : place + 1] == (True,)
            options = {name: _dense(x) for name, x in kwargs.items() if name not in ("inplace", "out")}
            drawn = func(*map(_dense, args[:place]), **options)
            target = (args[0] if args else kwargs["input"]) if writes else kwargs.get("out")
            return drawn if target is None else target.copy_(drawn)
        return func(*args, **kwargs)


def _is_dense(x: Any) -> bool:
    return not isinstance(x, torch.Tensor) or x.is_contiguous()


def _dense(x: Any) -> Any:
    return x if _is_dense(x) else x.contiguous()


_FILLS = frozenset(
    getattr(torch.Tensor, f"{name}_")
    for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")
)

# With the place of the argument that asks for a result in place.
_DRAWS: dict[Any, int] = {
    F.dropout: 3,
    F.dropout1d: 3,
    F.dropout2d: 3,
    F.dropout3d: 3,
    F.alpha_dropout: 3,
    F.feature_alpha_dropout: 3,
    F.rrelu: 4,
} | dict.fromkeys(
    (
        torch.alpha_dropout, torch.bernoulli, torch.binomial, torch.dropout, torch.feature_alpha_dropout,
        torch.feature_dropout, torch.native_dropout, torch.normal, torch.poisson, torch.rand_like, torch.randint_like,
        torch.randn_like, torch.rrelu, torch.Tensor.bernoulli,
    ),
    99,
)  # fmt: skip


class _Own(InOrder):
    """Sees every generator that is named in a call; the streams of two are not the same."""

    def __init__(self, words: bytes) -> None:
        super().__init__()
        self.words = words
        self.streams = itertools.count(1)
        self.before: dict[torch.Generator, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            generator = kwargs.get("generator")
            if generator is not None and generator not in self.before:
                self.seed(generator, stream=next(self.streams))
        return super().__torch_function__(func, types, args, kwargs)

    def seed(self, generator: torch.Generator, *, stream: int) -> None:
        self.before[generator] = generator.get_state()
        digest = hashlib.blake2b(self.words, digest_size=8, salt=stream.to_bytes(4, "little"))
        generator.manual_seed(int.from_bytes(digest.digest(), "little"))


def _generators() -> list[torch.Generator]:
    """Torch's own: of the CPU, and of each GPU."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


class Watched:
    """Torch's own generators, as they were when this was made."""

    def __init__(self) -> None:
        self.before = [(generator, generator.get_state()) for generator in _generators()]

    def were_drawn_from(self) -> bool:
        """Whether one of them has moved since."""
        return not all(torch.equal(state, generator.get_state()) for generator, state in self.before)
