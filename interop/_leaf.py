"""One leaf across, both ways: dtypes, layout, alignment, devices and lifetime.

Two sets of rules. *In a crossing* (`tensor_to_array`, `array_to_tensor`) a value is exact or an error, and dense: the
array aliases the tensor's memory only until the call returns. *Bare* (`share_tensor`, `share_array`) a value lives on
in the user's hands: any dense layout is shared, and 64-bit values follow what JAX can hold.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import ml_dtypes
import numpy as np
import torch
from jax.sharding import SingleDeviceSharding

from interop._errors import DeviceError, LeafError, NarrowingError, PrecisionError
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._streams import array_over, outlive, tensor_over
from interop._threads import refuse_forked

# --- dtypes -----------------------------------------------------------------------------------------------------------

NUMPY_OF: dict[torch.dtype, np.dtype[Any]] = {
    torch_dtype: np.dtype(numpy_dtype)
    for torch_dtype, numpy_dtype in {
        torch.bool: np.bool_,
        torch.int8: np.int8,
        torch.int16: np.int16,
        torch.int32: np.int32,
        torch.int64: np.int64,
        torch.uint8: np.uint8,
        torch.uint16: np.uint16,
        torch.uint32: np.uint32,
        torch.uint64: np.uint64,
        torch.float16: np.float16,
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float32: np.float32,
        torch.float64: np.float64,
        torch.complex64: np.complex64,
        torch.complex128: np.complex128,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
        torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
        torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
    }.items()
}
TORCH_OF: dict[np.dtype[Any], torch.dtype] = {numpy_dtype: dtype for dtype, numpy_dtype in NUMPY_OF.items()}

# What 64-bit dtypes become in a JAX that keeps 32 bits.
_NARROW = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.complex64),
}
WIDE_INTS = {torch.int64: torch.int32, torch.uint64: torch.uint32}
_config: Any = jax.config

WIDE_FLOATS = frozenset({torch.float64, torch.complex128})

# What numpy reads, and JAX keeps in any width.
NUMPY_READS = frozenset(
    dtype for dtype, seen in NUMPY_OF.items() if seen.kind in "biufc" and seen.isbuiltin == 1 and seen not in _NARROW
)

_SHORT = {"float": "f", "int": "i", "uint": "u", "complex": "c", "bfloat": "bf"}


def x64_enabled() -> bool:
    """Whether JAX keeps 64 bits in this thread."""
    return bool(_config.jax_enable_x64)


def jax_dtype(dtype: torch.dtype, *, x64: bool) -> np.dtype[Any]:
    """The dtype in which JAX holds a tensor of this dtype; raises `LeafError` where there is none."""
    found = NUMPY_OF.get(dtype)
    if found is None:
        raise LeafError(f"dtype {dtype} has no counterpart in JAX")
    return found if x64 else _NARROW.get(found, found)


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of an array's dtype; raises `LeafError` where there is none."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise LeafError(f"a typed PRNG key ({dtype}) can't cross", hint="Pass jax.random.key_data(key)")
    found = TORCH_OF.get(np.dtype(dtype))
    if found is None:
        raise LeafError(f"dtype {np.dtype(dtype).name} has no counterpart in torch")
    return found


def describe(leaf: Any) -> str:
    """Shape and dtype in JAX's short form: `f32[2,3]`; the type's name for what has none."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        return type(leaf).__name__
    name = str(dtype).removeprefix("torch.")
    stem = name.rstrip("0123456789")
    short = _SHORT[stem] + name[len(stem) :] if stem in _SHORT else name
    return f"{short}[{','.join(map(str, shape))}]"


def describe_all(leaves: Sequence[Any]) -> str:
    """Several of them: `(f32[2], i32[3])`."""
    return f"({', '.join(map(describe, leaves))})"


# --- devices ----------------------------------------------------------------------------------------------------------

_DEVICES: dict[torch.device, Any] = {}

# The CPU that results are made on, once it is known that JAX computes there unless it is told otherwise: of an array
# that is there, nothing is to be looked at.
AT_HOME: set[Any] = set()


def _forget_devices() -> None:
    """JAX's threads do not survive a fork: the child asks for its devices again, and is told."""
    _DEVICES.clear()
    AT_HOME.clear()


os.register_at_fork(after_in_child=_forget_devices)


def jax_device(device: torch.device) -> Any:
    """The JAX device of a torch device; starts the backend on first use."""
    found = _DEVICES.get(device)
    if found is None:
        found = _DEVICES[device] = _find_jax_device(device)
        if device.type == "cpu" and jax.default_backend() == "cpu":
            AT_HOME.add(found)
    return found


def traced_device() -> torch.device:
    """The device that a function is traced for: where JAX puts what it is not told to put elsewhere."""
    place = _config.jax_default_device
    platform = jax.default_backend() if place is None else getattr(place, "platform", place)
    return torch.device("cpu" if platform == "cpu" or not torch.cuda.is_available() else "cuda")


def computes_on_cpu() -> bool:
    """Whether JAX computes on the CPU what it is not told to compute elsewhere: a numpy array goes there, say."""
    if _CPU not in _DEVICES:
        jax_device(_CPU)
    return bool(AT_HOME)


def _find_jax_device(device: torch.device) -> Any:
    refuse_forked()
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"tensors on a '{device.type}' device can't cross", hint="Move them to 'cpu' or 'cuda'")
    if device.type == "cpu":
        return jax.local_devices(backend="cpu")[0]
    index = torch.cuda.current_device() if str(device) == "cuda" else device.index
    try:
        return next(d for d in jax.local_devices(backend="cuda") if d.local_hardware_id == index)
    except (RuntimeError, StopIteration):
        raise DeviceError(f"JAX has no device for {device}", hint="Install jax[cuda12] or jax[cuda13]") from None


def torch_device(device: Any) -> torch.device:
    """The torch device of a JAX device."""
    if device.platform == "cpu":
        return torch.device("cpu")
    if device.platform in ("gpu", "cuda"):
        return torch.device("cuda", device.local_hardware_id)
    raise DeviceError(f"arrays on a '{device.platform}' device can't cross", hint="Move them to 'cpu' or 'gpu'")


# --- a tensor becomes an array ----------------------------------------------------------------------------------------

# Types whose memory is what it says. A wrapper subclass has none: JAX would read address 0.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_CPU = torch.device("cpu")
_DIRECT = frozenset(NUMPY_OF) - WIDE_FLOATS - {torch.int64, torch.uint64, torch.complex64}
_import_capsule, _capsule_of, _copy_of = jax_private.import_capsule, torch_private.capsule_of, jax_private.copy_of
_view_of, _Lent = np.from_dlpack, torch_private.Lent


def tensor_to_array(t: torch.Tensor, *, x64: bool = False) -> jax.Array:
    """A tensor as an array for the length of one crossing: shared if dense and aligned, else copied.

    The caller sees to it that `x64` is on while a 64-bit float crosses.
    """
    if (
        type(t) not in PLAIN
        or t.dtype not in _DIRECT
        or t.layout is not torch.strided
        or t.is_nested
        or not t.is_cpu
        or t.is_neg()
        or not t.is_contiguous()
        or t.data_ptr() & 63
    ):
        t = _dense(refuse_foreign(t), x64=x64)
    return import_tensor(t.detach())


def import_tensor(t: torch.Tensor) -> jax.Array:
    """An array over the memory of a tensor that is known to be fit for it."""
    device = _DEVICES.get(t.device) or jax_device(t.device)
    if _import_capsule is None:
        return _import_by_protocol(t, device)
    if not t.is_cpu:
        return array_over(t, device)
    return _import_capsule(_capsule_of(t), device, None)


def _import_by_protocol(t: torch.Tensor, device: Any) -> jax.Array:
    """By the public protocol: on a GPU, JAX waits for torch's stream, where the tensor's device is current."""
    with contextlib.ExitStack() as stack:
        if t.is_cuda:
            stack.enter_context(torch.cuda.device(t.device))
        stack.enter_context(jax.enable_x64(True))  # else 64 bits would be narrowed in silence
        return jax.device_put(jax.dlpack.from_dlpack(t), device)


def import_to_keep(t: torch.Tensor) -> jax.Array:
    """An array over the memory of a tensor that is fit for it, which outlives the call."""
    array = import_tensor(t)
    if not t.is_cpu:
        outlive(t, array.device)
    return array


def is_home(device: Any) -> bool:
    """Whether it is the CPU that results are made on, and JAX computes on."""
    return computes_on_cpu() and device in AT_HOME


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """The device that a function of these tensors runs on: a number on the CPU goes where the others are."""
    here = next((t for t in tensors if t.dim() or not t.is_cpu), None)
    if here is not None or tensors:
        return _CPU if here is None else here.device
    default = torch.get_default_device()
    return default if default.type == "cuda" else _CPU


def refuse_two_devices(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `DeviceError` for tensors on several devices, which JAX would move; a number of the CPU may go anywhere."""
    first = next((t for t in tensors if t.dim() or not t.is_cpu), None)
    for index, t in enumerate(tensors):
        if first is not None and t.device != first.device and (t.dim() or not t.is_cpu):
            raise DeviceError(f"tensors on {first.device} and {t.device} together", hint="Move them to one device").at(
                index
            )


# Bytes up to which numpy copies an array in less time than torch, whose blocks cost 2 us; torch copies large ones in
# several threads.
SMALL = 2**17


def view_of(t: torch.Tensor) -> Any:
    """A numpy array over the memory of a CPU tensor, for the length of one call; None for one that has to be looked at.

    It costs 0.6 us, against 3 us of an array by DLPack, and any strides will do. (`Tensor.numpy()` would do the same,
    but fixes the size of the storage for good, which FSDP frees and fills.)
    """
    dtype = t.dtype
    is_plain = type(t) in PLAIN and dtype in NUMPY_READS and t.is_cpu
    if is_plain and not (t.is_neg() or (dtype is torch.complex64 and t.is_conj())):  # of those, the one complex dtype
        try:
            return None if t._is_zerotensor() else _view_of(_Lent(t))
        except (RuntimeError, TypeError, BufferError):
            pass  # sparse, meta, batched
    return None


def copy_tensor(view: Any) -> jax.Array:
    """The values of a numpy array as an array on the CPU of their own."""
    device = _DEVICES.get(_CPU) or jax_device(_CPU)
    try:
        return _copy_of(view, device)
    except jax.errors.JaxRuntimeError as error:
        if "Disallowed host-to-device transfer" not in str(error):
            raise
    with jax.transfer_guard_host_to_device("allow"):  # a crossing is meant
        return _copy_of(view, device)


def argument_of(t: torch.Tensor, *, x64: bool) -> Any:
    """A tensor as an argument of a jitted function, for the length of one call whose outputs are waited for.

    A number, and where JAX computes on the CPU any tensor, may go without saying where it is.
    """
    view = view_of(t) if AT_HOME or not t.dim() or computes_on_cpu() else None
    return tensor_to_array(t, x64=x64) if view is None else view


def resolve(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself with its lazy bits applied; raises `LeafError` for one whose memory is not its value."""
    return refuse_foreign(t).resolve_conj().resolve_neg()


def refuse_foreign(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself; raises `LeafError` for one whose memory is not its value, even with its lazy bits applied."""
    if torch_private.is_traced(t):
        raise LeafError(
            f"a tensor without a value ({type(t).__name__}), which was kept while the function was traced",
            hint="Make what it keeps before it is traced, or call it once outside jit",
        )
    if type(t) not in PLAIN:
        raise LeafError(f"a tensor of type {type(t).__module__}.{type(t).__qualname__} can't cross", hint=_way_out(t))
    if t.is_nested:
        raise LeafError("a nested tensor can't cross", hint="Pass x.to_padded_tensor(0.0)")
    if t.layout is not torch.strided:
        raise LeafError(f"a {str(t.layout).removeprefix('torch.')} tensor can't cross", hint="Pass x.to_dense()")
    if t.is_meta:
        raise LeafError("a tensor on the 'meta' device has no values", hint="Materialise it with to_empty()")
    jax_dtype(t.dtype, x64=True)
    return t


def _way_out(t: torch.Tensor) -> str:
    if hasattr(t, "to_local"):
        return "Pass its local part, x.to_local()"
    return "Convert it to a plain torch.Tensor first, or say what it is made of: interop.register_leaf"


def _dense(t: torch.Tensor, *, x64: bool) -> torch.Tensor:
    """Contiguous, 64-byte aligned, and of a dtype that JAX keeps."""
    for _, applies, copied in _COPIES:
        if applies(t, x64):
            t = copied(t)
    return t


def why_copied(t: torch.Tensor, *, x64: bool) -> str | None:
    """Why a tensor does not share its memory in a crossing; None where it does."""
    return next((why for why, applies, _ in _COPIES if applies(t, x64)), None)


def narrow(t: torch.Tensor) -> torch.Tensor:
    """A 64-bit integer tensor in 32 bits; raises `NarrowingError` if a value does not fit."""
    target = WIDE_INTS[t.dtype]
    small = t.to(target)
    lost = (small.to(t.dtype) != t).flatten()
    if lost.any():
        value = t.flatten()[int(lost.nonzero()[0])].item()
        raise NarrowingError(
            f"the value {value} does not fit into {str(target).removeprefix('torch.')}",
            got=describe(t),
            hint="JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
        )
    return small


# Why a tensor is copied on its way into a crossing, when that applies, and the copy; in this order.
_COPIES: tuple[tuple[str, Callable[[torch.Tensor, bool], bool], Callable[[torch.Tensor], torch.Tensor]], ...] = (
    ("it is a conjugated view", lambda t, _: t.is_conj(), torch.Tensor.resolve_conj),
    ("it is a negated view", lambda t, _: t.is_neg(), torch.Tensor.resolve_neg),
    ("64-bit integers go in 32 bits", lambda t, x64: not x64 and t.dtype in WIDE_INTS, narrow),
    ("it is not contiguous", lambda t, _: not t.is_contiguous(), torch.Tensor.contiguous),
    # JAX would copy it too, but only after the call has returned.
    ("its memory is not aligned to 64 bytes", lambda t, _: t.data_ptr() & 63 != 0, torch.Tensor.clone),
)


def too_large(number: int) -> NarrowingError:
    """The refusal of a Python integer that needs 64 bits."""
    return NarrowingError(
        f"the value {number} does not fit into int32",
        hint="JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
    )


def share_tensor(t: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """A tensor as an array that the user keeps: its memory is shared in any dense layout, unless `copy`."""
    x64 = x64_enabled()
    t = resolve(t.detach())
    if t.dtype in WIDE_FLOATS and not x64:
        warnings.warn(
            f"{describe(t)} is narrowed to 32 bits: JAX keeps 64 only with jax_enable_x64", UserWarning, stacklevel=4
        )
        t = t.to(torch.float32 if t.dtype is torch.float64 else torch.complex64)
    elif t.dtype in WIDE_INTS and not x64:
        t = narrow(t)
    elif copy or t.data_ptr() & 63:
        t = t.clone()
    return import_to_keep(_compact(t))


def copy_to_keep(t: torch.Tensor) -> jax.Array:
    """A copy of a tensor as an array that the user keeps; raises for 64-bit floats that JAX would narrow."""
    x64 = x64_enabled()
    if t.dtype in WIDE_FLOATS and not x64:
        raise PrecisionError(
            "it would be narrowed to 32 bits",
            got=describe(t),
            hint="Call module.float(), or set jax.config.update('jax_enable_x64', True)",
        )
    t = resolve(t.detach())
    if t.dtype in WIDE_INTS and not x64:
        t = narrow(t)
    return import_to_keep(t.clone(memory_format=torch.contiguous_format))


def _compact(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself if some order of its axes is contiguous (JAX keeps that order as a layout), else a copy."""
    strides = t.stride()
    axes = sorted(range(t.dim()), key=lambda i: (t.shape[i] == 1, -strides[i]))
    return t if t.numel() == 0 or t.permute(axes).is_contiguous() else t.contiguous()


# --- an array becomes a tensor ----------------------------------------------------------------------------------------

_from_capsule, _array_capsule = torch_private.from_capsule, jax_private.capsule_of


def export(a: jax.Array) -> torch.Tensor:
    """A tensor over the memory of a result, which is dense, and ready or about to be; gathered from several devices."""
    if type(a.sharding) is not SingleDeviceSharding:  # the private name would export the first shard alone
        a = local(a)
    if AT_HOME:
        t = _from_capsule(_array_capsule(a))
        if t.is_cpu:
            return t
    device: Any = a.device  # 2 us
    return _from_capsule(_array_capsule(a)) if device.platform == "cpu" else tensor_over(a, device)


def array_to_tensor(a: Any) -> torch.Tensor:
    """A tensor over the memory of an array; a sharded one is gathered first. Raises `LeafError` where there is none."""
    # A view of the array, which the user may delete: of the array itself, XLA would abort the process.
    return export(local(a).addressable_data(0))


def local(a: Any) -> jax.Array:
    """The array on one device, checked to be one that torch can hold."""
    is_there = type(a) is jax_private.ArrayImpl and not a.is_deleted()
    if is_there and a.dtype in TORCH_OF and type(a.sharding) is SingleDeviceSharding:
        return a
    if isinstance(a, jax.core.Tracer):
        raise LeafError(f"a tracer ({describe(a)}) has no values to share", hint="Stack @jittable and @as_jax")
    if not isinstance(a, jax.Array):  # JAX's rules meet Python numbers too; its own conversion would be traced there
        return tensor_to_array(tensor_of_numpy(np.asarray(a, jax.typeof(a).dtype)), x64=True)
    torch_dtype(a.dtype)
    if a.is_deleted():
        raise LeafError(f"the array {describe(a)} was deleted or donated")
    if not a.is_fully_addressable:
        raise DeviceError(
            "an array of several processes can't be gathered in one", hint="Use jax.shard_map inside jax.jit"
        )
    if len(a.sharding.device_set) > 1:
        a = jax.device_put(a, next(iter(sorted(a.sharding.device_set, key=str))))
    return a


def share_array(a: Any, *, copy: bool = False) -> torch.Tensor:
    """An array as a tensor that the user keeps: its memory is shared unless `copy`."""
    t = array_to_tensor(a)
    return t.clone() if copy else t


# --- numpy ------------------------------------------------------------------------------------------------------------


def tensor_of_numpy(x: Any) -> torch.Tensor:
    """A numpy array or scalar as a tensor, copied: numpy's memory is the user's to write."""
    if isinstance(x, np.ndarray) and type(x) not in (np.ndarray, np.memmap):  # a mask, a unit would be dropped
        raise LeafError(
            f"a numpy array of type {type(x).__module__}.{type(x).__qualname__} can't cross",
            hint="Convert it to a plain numpy.ndarray first, or say what it is made of: interop.register_leaf",
        )
    x = np.array(x)
    if x.dtype not in TORCH_OF:
        raise LeafError(f"a numpy array of dtype {x.dtype} can't cross")
    if x.dtype.kind == "V":  # bfloat16 and float8 are numpy extensions that torch does not read
        return torch.from_numpy(x.view(f"u{x.dtype.itemsize}")).view(TORCH_OF[x.dtype])
    return torch.from_numpy(x)


def array_of_numpy(x: Any) -> jax.Array:
    """A numpy array or scalar as an array, in the dtype that JAX gives it; an integer that does not fit raises."""
    t = tensor_of_numpy(x)
    if t.dtype in WIDE_FLOATS or x64_enabled():
        return jax.numpy.array(np.asarray(x))
    return tensor_to_array(t)
