"""A torch function as a first-class citizen of JAX: the engine, and the flat functions it runs."""

from interop._in_jax._capture import Capture as Capture
from interop._in_jax._capture import capture_or_reason as capture_or_reason
from interop._in_jax._engine import call as call
from interop._in_jax._engine import check_differentiable as check_differentiable
from interop._in_jax._flat import TorchFlat as TorchFlat
from interop._in_jax._flat import is_inexact as is_inexact
from interop._in_jax._flat import keyed as keyed
