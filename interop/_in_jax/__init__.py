"""A torch function as a first-class citizen of JAX: the engine, and the flat functions it runs."""

from interop._in_jax._engine import call as call
from interop._in_jax._flat import TorchFlat as TorchFlat
from interop._in_jax._flat import keyed as keyed
