"""A JAX function as a first-class citizen of torch: the engine, and the flat functions it runs."""

from interop._in_torch._engine import call as call
from interop._in_torch._flat import FLATS as FLATS
from interop._in_torch._flat import JaxFlat as JaxFlat
