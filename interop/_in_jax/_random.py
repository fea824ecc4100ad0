"""Random numbers of torch in a program of JAX: drawn from a key, or, without one, an effect of the program."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator
from typing import Any

import torch

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
    error = UnsupportedError(f"it draws random numbers, and {where}", hint=KEYED)
    error.function = name
    return error


@contextlib.contextmanager
def seeding(key: torch.Tensor) -> Generator[None]:
    """Seed torch's generators from a hash of a key's data, whatever its implementation; put back at the end."""
    # A batch of keys has no one value: `tolist` raises, and the batch is run as a loop.
    data: list[Any] = key.tolist()
    words = b"".join(int(word).to_bytes(4, "little") for word in data)
    seed = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
    with TAKING_TURNS:  # the generators belong to the process
        generators = [torch.default_generator, *_generators_of_gpus()]
        before = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def _generators_of_gpus() -> tuple[torch.Generator, ...]:
    return torch.cuda.default_generators if torch.cuda.is_initialized() else ()
