"""Random numbers of torch in a program of JAX: drawn from a key, or, without one, an effect of the program."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator
from typing import Any

import torch
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


class _Own(TorchFunctionMode):
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
        return func(*args, **(kwargs or {}))

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
