"""A JAX function as a first-class citizen of torch: the engine, and the flat functions it runs."""

from interop._in_torch._effects import Effectful as Effectful
from interop._in_torch._engine import asked as asked
from interop._in_torch._engine import call as call
from interop._in_torch._engine import check_differentiable as check_differentiable
from interop._in_torch._engine import in_64_bits as in_64_bits
from interop._in_torch._engine import lifted as lifted
from interop._in_torch._flat import FLATS as FLATS
from interop._in_torch._flat import JaxFlat as JaxFlat
from interop._in_torch._residuals import Plan as Plan
from interop._in_torch._residuals import with_residuals as with_residuals
from interop._in_torch._sizes import avals_of as avals_of
