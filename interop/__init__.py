"""Calling PyTorch from JAX and JAX from PyTorch, closed under the transforms of both.

@jittable
@differentiable
@as_jax                       # a torch function, called from JAX
def energy(params, x):
    return torch.func.functional_call(net, params, (x,)).sum()

forces = jax.jit(jax.grad(energy, argnums=1))
"""

from interop._convert import jax_to_torch, make_functional, torch_module_to_jax, torch_to_jax
from interop._decorators import as_jax, as_torch, differentiable, jittable
from interop._errors import (
    AbstractEvalError,
    ContainerError,
    DeviceError,
    ForkError,
    InteropError,
    LeafError,
    NarrowingError,
    NestedError,
    NotDifferentiableError,
    NotJittableError,
    OptionError,
    OutputMismatchError,
    PrecisionError,
    UnsupportedError,
)
from interop._explain import explain
from interop._module_in_torch import WrappedJaxFunction, WrappedJaxScalarFunction
from interop._registered import register_leaf
from interop._types import Crossed, SupportsJax, SupportsTorch

__version__ = "0.1.0"

__all__ = [
    "AbstractEvalError",
    "ContainerError",
    "Crossed",
    "DeviceError",
    "ForkError",
    "InteropError",
    "LeafError",
    "NarrowingError",
    "NestedError",
    "NotDifferentiableError",
    "NotJittableError",
    "OptionError",
    "OutputMismatchError",
    "PrecisionError",
    "SupportsJax",
    "SupportsTorch",
    "UnsupportedError",
    "WrappedJaxFunction",
    "WrappedJaxScalarFunction",
    "as_jax",
    "as_torch",
    "differentiable",
    "explain",
    "jax_to_torch",
    "jittable",
    "make_functional",
    "register_leaf",
    "torch_module_to_jax",
    "torch_to_jax",
]
