"""Bare values across, both ways: dtypes, memory, layouts, bits, devices, 64 bits, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import interop
from interop import as_jax, as_torch, jax_to_torch, torch_to_jax


def address(leaf: Any) -> int:
    """Where the memory of a leaf is, as DLPack exports it."""
    return leaf.data_ptr() if isinstance(leaf, torch.Tensor) else torch.from_dlpack(leaf).data_ptr()


def bits(leaf: Any) -> bytes:
    """The memory of a leaf in the order of its elements."""
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.contiguous()
        return bytes(leaf.view(torch.uint8).numpy().tobytes()) if leaf.dim() else bits(leaf.reshape(1))
    return np.asarray(leaf).tobytes()


# --- dtypes -----------------------------------------------------------------------------------------------------------

# Held by both frameworks, whatever jax_enable_x64 says.
NARROW_DTYPES = {
    torch.bool: np.bool_,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.complex64: np.complex64,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
    torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu,
}
WIDE_DTYPES = {
    torch.int64: np.int64,
    torch.uint64: np.uint64,
    torch.float64: np.float64,
    torch.complex128: np.complex128,
}


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Six values, also ones that a detour through another dtype would lose."""
    if dtype in (torch.float8_e8m0fnu,):
        return torch.tensor([1, 2, 4, 0.5, 8, 16]).to(dtype)
    if dtype.is_floating_point:
        return torch.tensor([0.0, -0.0, float("nan"), 1.5, -2.0, 0.25]).to(dtype)
    if dtype.is_complex:
        return torch.tensor([0, 1j, -1j, complex("nan"), 1 + 2j, -0.5]).to(dtype)
    if dtype is torch.bool:
        return torch.tensor([True, False, True, True, False, False])
    info = torch.iinfo(dtype)
    return torch.tensor([0, 1, 2, 3, info.min, info.max], dtype=dtype)


@pytest.mark.parametrize(("of_torch", "of_jax"), NARROW_DTYPES.items(), ids=str)
def test_dtype_crosses_exactly_and_without_a_copy(of_torch: torch.dtype, of_jax: Any) -> None:
    """Both ways, bit for bit, over the same memory."""
    x = sample(of_torch).clone()
    a = torch_to_jax(x)
    assert a.dtype == of_jax
    assert bits(a) == bits(x)
    assert address(a) == x.data_ptr()
    back = jax_to_torch(a)
    assert back.dtype is of_torch
    assert back.data_ptr() == x.data_ptr()
    assert bits(back) == bits(x)


@pytest.mark.parametrize(("of_torch", "of_jax"), WIDE_DTYPES.items(), ids=str)
def test_64_bits_cross_exactly_with_x64_on(of_torch: torch.dtype, of_jax: Any) -> None:
    """As they are, without a copy."""
    x = sample(of_torch).clone()
    with jax.enable_x64(True):
        a = torch_to_jax(x)
        assert a.dtype == of_jax
        assert bits(a) == bits(x)
        assert address(a) == x.data_ptr()
        assert bits(jax_to_torch(a)) == bits(x)


@pytest.mark.parametrize("dtype", [*NARROW_DTYPES, torch.int64, torch.float64, torch.complex128], ids=str)
def test_dtype_through_a_crossing_into_jax(dtype: torch.dtype) -> None:
    """A function of one host returns its argument in the argument's dtype; what does not fit was refused before."""
    x = sample(dtype) if dtype is not torch.int64 else torch.tensor([0, 1, -5, 2**31 - 1])
    y = as_torch(lambda a: a)(x)
    assert y.dtype is (torch.int32 if dtype is torch.int64 else dtype)
    assert bits(y) == bits(x.to(y.dtype))


@pytest.mark.parametrize("dtype", NARROW_DTYPES.values(), ids=lambda d: np.dtype(d).name)
def test_dtype_through_a_crossing_into_torch(dtype: Any) -> None:
    """Bit for bit, also under jit."""
    inverse = {np.dtype(v): k for k, v in NARROW_DTYPES.items()}
    a = torch_to_jax(sample(inverse[np.dtype(dtype)]).clone())
    crossing = interop.jittable(as_jax(lambda t: t.clone()))
    for call in (crossing, jax.jit(crossing)):
        assert call(a).dtype == dtype
        assert bits(call(a)) == bits(a)


# --- 64 bits while JAX keeps 32 ---------------------------------------------------------------------------------------


def test_int64_narrows_if_it_fits() -> None:
    a = torch_to_jax(torch.tensor([2**31 - 1, -(2**31)]))
    assert a.dtype == jnp.int32
    assert a.tolist() == [2**31 - 1, -(2**31)]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40 + 1])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1)], ids=str)
def test_int64_that_does_not_fit_raises(value: int, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, value)
    with pytest.raises(OverflowError, match=str(value)):
        torch_to_jax(x)
    with pytest.raises(interop.NarrowingError, match=str(value)):
        as_torch(lambda a: a)(x)


def test_the_value_that_does_not_fit_is_named() -> None:
    with pytest.raises(OverflowError, match=f"the value {2**33} "):
        torch_to_jax(torch.tensor([[0, 2**33], [2**34, 1]]))


def test_uint64_that_does_not_fit_raises() -> None:
    assert torch_to_jax(torch.tensor([2**32 - 1], dtype=torch.uint64)).dtype == jnp.uint32
    with pytest.raises(OverflowError):
        torch_to_jax(torch.tensor([2**32], dtype=torch.uint64))


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float64, jnp.float32), (torch.complex128, jnp.complex64)], ids=str)
def test_a_bare_wide_float_is_narrowed_with_a_warning(wide: torch.dtype, narrow: Any) -> None:
    """The one documented cast. The warning points at the caller's line."""
    x = torch.tensor([1.5, 2.5], dtype=wide)
    with pytest.warns(UserWarning, match="jax_enable_x64") as caught:
        a = torch_to_jax(x)
    assert a.dtype == narrow
    assert a.tolist() == [1.5, 2.5]
    assert caught[0].filename == __file__


def test_a_bare_wide_float_in_a_tree_warns_at_the_caller() -> None:
    with pytest.warns(UserWarning) as caught:
        torch_to_jax({"x": [torch.tensor(1.0, dtype=torch.float64)]})
    assert caught[0].filename == __file__


def test_a_crossing_keeps_float64() -> None:
    """Constants, sums and products stay wide, and JAX outside is as it was."""
    x = torch.tensor([0.1, 0.2], dtype=torch.float64)
    y = as_torch(lambda a: a * 2 + jnp.ones(2) / 3 + a.mean())(x)
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, x * 2 + 1 / 3 + x.mean(), rtol=1e-15, atol=0)
    assert jnp.asarray(1.0).dtype == jnp.float32


def test_int64_beside_float64_stays_wide() -> None:
    y = as_torch(lambda a, i: (a, i))(torch.ones(1, dtype=torch.float64), torch.tensor([2**40]))
    assert [out.dtype for out in y] == [torch.float64, torch.int64]
    assert y[1].item() == 2**40


def test_a_torch_result_of_int64_narrows_if_it_fits() -> None:
    crossing = interop.jittable(as_jax(lambda t: t.argmax()))
    for call in (crossing, jax.jit(crossing)):
        assert call(jnp.arange(3.0)).dtype == jnp.int32
        assert call(jnp.arange(3.0)) == 2


def test_a_torch_result_of_int64_that_does_not_fit_raises() -> None:
    with pytest.raises(OverflowError, match=str(2**40)):
        as_jax(lambda t: t.long() + 2**40)(jnp.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_torch_result_of_wide_floats_raises(dtype: torch.dtype) -> None:
    """It names both ways out; the same eagerly and under jit."""
    crossing = interop.jittable(as_jax(lambda t: t.to(dtype)))
    for call in (crossing, jax.jit(crossing)):
        with pytest.raises(interop.PrecisionError, match=r"\.float\(\)|jax_enable_x64"):
            call(jnp.zeros(2))


def test_the_thread_does_not_matter() -> None:
    """`enable_x64` belongs to a thread; a crossing's result does not."""
    from concurrent.futures import ThreadPoolExecutor

    f = as_torch(lambda a: a / 3)
    x = torch.ones(2, dtype=torch.float64)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(f, x).result()
    assert torch.equal(f(x), other)


# --- layouts ----------------------------------------------------------------------------------------------------------

# Every element once, in some order of the axes: shared.
DENSE: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.arange(24.0).reshape(2, 3, 4),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.arange(96.0).reshape(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(3.0),
    "one_element": lambda: torch.tensor([[3.0]]),
    "size_one_axis": lambda: torch.arange(4.0).reshape(4, 1).as_strided((4, 1), (1, 17)),
}
# Memory with gaps, overlaps or repetitions: copied.
SPARSE: dict[str, Callable[[], torch.Tensor]] = {
    "every_second": lambda: torch.arange(32.0)[::2],
    "columns": lambda: torch.arange(32.0).reshape(2, 16)[:, ::2],
    "expanded": lambda: torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 3),
    "expanded_scalar": lambda: torch.tensor(2.0).expand(4),
    "diagonal": lambda: torch.arange(9.0).reshape(3, 3).diagonal(),
    "unfolded": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "flipped": lambda: torch.arange(6.0).flip(0),
}
EMPTY: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(0),
    "empty_rows": lambda: torch.empty(0, 3),
    "empty_columns": lambda: torch.empty(3, 0).T,
}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_a_dense_layout_is_shared(make: Callable[[], torch.Tensor]) -> None:
    """And its strides come back."""
    x = make()
    a = torch_to_jax(x)
    np.testing.assert_array_equal(a, x.numpy())
    assert address(a) == x.data_ptr()
    back = jax_to_torch(a)
    assert back.data_ptr() == x.data_ptr()
    assert [s for s, n in zip(back.stride(), x.shape, strict=True) if n > 1] == [
        s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1
    ]


@pytest.mark.parametrize("make", (DENSE | SPARSE | EMPTY).values(), ids=DENSE | SPARSE | EMPTY)
def test_every_layout_has_the_right_values(make: Callable[[], torch.Tensor]) -> None:
    """Bare, and as an argument of a crossing."""
    x = make()
    a = torch_to_jax(x)
    assert a.shape == tuple(x.shape)
    np.testing.assert_array_equal(a, x.numpy())
    assert torch.equal(as_torch(lambda a: a + 1)(x), x + 1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)])
def test_an_array_is_shared(shape: tuple[int, ...]) -> None:
    a = jnp.arange(float(np.prod(shape))).reshape(shape)
    x = jax_to_torch(a)
    assert tuple(x.shape) == shape
    np.testing.assert_array_equal(a, x.numpy())
    if x.numel():
        assert x.data_ptr() == address(a)


def test_a_write_shows_on_the_other_side() -> None:
    """What sharing memory means; `copy=True` is the way out."""
    x = torch.ones(16)
    shared, copied = torch_to_jax(x), torch_to_jax(x, copy=True)
    x.zero_()
    assert float(shared[0]) == 0
    assert float(copied[0]) == 1


def test_copies_are_copies() -> None:
    x = torch.ones(16)
    assert address(torch_to_jax(x, copy=True)) != x.data_ptr()
    a = jnp.ones(16)
    y = jax_to_torch(a, copy=True)
    assert y.data_ptr() != address(a)
    y.zero_()
    assert float(a[0]) == 1


def test_a_copy_of_a_narrowed_tensor_is_a_copy_once() -> None:
    x = torch.ones(4, dtype=torch.int64)
    a = torch_to_jax(x, copy=True)
    x.zero_()
    assert a.tolist() == [1] * 4


@pytest.mark.parametrize("offset", [1, 4, 15])
def test_unaligned_memory_is_copied(offset: int) -> None:
    """JAX wants 64 bytes, and would copy later than it says."""
    base = torch.arange(64.0)
    x = base[offset:]
    a = torch_to_jax(x)
    base.zero_()
    np.testing.assert_array_equal(a, np.arange(64.0)[offset:])


def test_the_result_of_a_crossing_is_not_copied_again() -> None:
    """`as_torch` hands over what JAX has made: nothing else holds it, so it may be written."""
    y = as_torch(lambda a: a + 1)(torch.zeros(16))
    y.add_(1)
    assert y.tolist() == [2] * 16


# --- bits and tangents that are not in the memory ---------------------------------------------------------------------


def test_conjugation_and_negation_are_applied() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    x = torch._neg_view(torch.ones(3))
    assert torch_to_jax(z.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert torch_to_jax(z.conj().imag).tolist() == [-2, 4]
    assert torch_to_jax(x).tolist() == [-1] * 3
    assert torch.equal(as_torch(lambda a: a * 1)(z.conj()), z.conj())
    assert torch.equal(as_torch(lambda a: a * 1)(x), x)


def test_a_tensor_that_requires_grad_is_converted_without_its_graph() -> None:
    """Documented for bare values; a crossing never does it."""
    x = torch.ones(3, requires_grad=True)
    assert torch_to_jax(x * 2).tolist() == [2] * 3
    assert not jax_to_torch(torch_to_jax(x)).requires_grad


def test_parameters_and_buffers_are_tensors() -> None:
    assert torch_to_jax(torch.nn.Parameter(torch.ones(2))).tolist() == [1, 1]
    assert torch_to_jax(torch.nn.Buffer(torch.ones(2))).tolist() == [1, 1]


def test_under_deterministic_debug_mode() -> None:
    torch.set_deterministic_debug_mode("error")
    try:
        assert jax_to_torch(torch_to_jax(torch.ones(5)[1:])).tolist() == [1] * 4
        assert as_torch(lambda a: a + 1)(torch.ones(3)[::2]).tolist() == [2, 2]
    finally:
        torch.set_deterministic_debug_mode("default")


def test_an_inference_tensor_crosses() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
        assert as_torch(lambda a: a + 1)(x).tolist() == [2] * 3
    assert torch_to_jax(x).tolist() == [1] * 3
    assert as_torch(lambda a: a + 1)(x).tolist() == [2] * 3


# --- what is refused --------------------------------------------------------------------------------------------------


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(4)


class Subclass(torch.Tensor):
    """A subclass that nobody has said anything about."""


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


def _sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(2).to_sparse_csr()


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


REFUSED_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "sparse"),
    "sparse_csr": (_sparse_csr, "sparse_csr"),
    "quantized": (_quantized, "quint8"),
    "nested": (_nested, "nested"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta"),
    "fake": (_fake, "FakeTensor"),
    "subclass": (lambda: torch.ones(2).as_subclass(Subclass), "Subclass"),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), "complex32"),
    "int4": (lambda: torch.empty(2, dtype=torch.int4), "int4"),
    "uint2": (lambda: torch.empty(2, dtype=torch.uint2), "uint2"),
}


@pytest.mark.parametrize(("make", "name"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_a_tensor_whose_memory_is_not_its_value_is_refused_by_name(make: Callable[[], torch.Tensor], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = make()
    with pytest.raises(interop.LeafError, match=name):
        torch_to_jax(x)


@pytest.mark.parametrize("make", [m for m, _ in REFUSED_TENSORS.values()], ids=REFUSED_TENSORS)
def test_the_same_into_a_crossing(make: Callable[[], torch.Tensor], request: pytest.FixtureRequest) -> None:
    """A fake tensor means that somebody is tracing: its message names the decorator."""
    x = make()
    refusal = interop.NotJittableError if request.node.callspec.id == "fake" else interop.LeafError
    with pytest.raises(refusal):
        as_torch(lambda a: a)(x)


def _deleted() -> jax.Array:
    a = jnp.ones(3)
    a.delete()
    return a


REFUSED_ARRAYS: dict[str, tuple[Callable[[], jax.Array], str]] = {
    "typed_key": (lambda: jax.random.key(0), r"jax\.random\.key_data"),
    "int4": (lambda: jnp.ones(2, jnp.int4), "int4"),
    "uint2": (lambda: jnp.ones(2, jnp.uint2), "uint2"),
    "float8_e3m4": (lambda: jnp.ones(2, jnp.float8_e3m4), "float8_e3m4"),
    "float4": (lambda: jnp.ones(2, jnp.float4_e2m1fn), "float4"),
    "deleted": (_deleted, "deleted"),
}


@pytest.mark.parametrize(("make", "name"), REFUSED_ARRAYS.values(), ids=REFUSED_ARRAYS)
def test_an_array_without_counterpart_is_refused_by_name(make: Callable[[], jax.Array], name: str) -> None:
    with pytest.raises(interop.LeafError, match=name):
        jax_to_torch(make())
    with pytest.raises(interop.LeafError, match=name):
        as_jax(lambda t: t)(make())


def test_a_tracer_is_refused() -> None:
    with pytest.raises(interop.LeafError, match="@jittable"):
        jax.jit(jax_to_torch)(jnp.ones(2))


def test_the_library_works_after_refusals() -> None:
    for make, _ in REFUSED_ARRAYS.values():
        with pytest.raises(interop.InteropError):
            jax_to_torch(make())
    assert jax_to_torch(jnp.ones(2)).tolist() == [1, 1]


def test_an_array_is_deleted_while_a_tensor_holds_its_memory(run_python: Callable[..., str]) -> None:
    """XLA would abort the process."""
    out = run_python("""
        import jax, jax.numpy as jnp
        from interop import as_jax, differentiable, jax_to_torch
        a, b = jnp.arange(4.0), jnp.arange(4.0)
        t = jax_to_torch(a)
        _, pull = jax.vjp(differentiable(as_jax(lambda x: (x * x).sum())), b)
        a.delete()
        b.delete()
        print(t.tolist(), pull(jnp.ones(()))[0].tolist())
    """)
    assert out.split("\n")[0] == "[0.0, 1.0, 2.0, 3.0] [0.0, 2.0, 4.0, 6.0]"


# --- trees, and what is no leaf ---------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any


@dataclasses.dataclass
class Box:
    """A plain dataclass, registered nowhere."""

    content: Any
    label: str = "box"


def test_trees_cross_leaf_by_leaf() -> None:
    x = torch.ones(3)
    tree = {"z": [x, (x, None)], 1: Point(x, "text"), "o": OrderedDict(b=x, a=2)}
    out = torch_to_jax(tree)
    assert list(out) == ["z", 1, "o"]
    assert isinstance(out["z"][0], jax.Array)
    assert out["z"][1][1] is None
    assert isinstance(out[1], Point)
    assert isinstance(out[1].x, jax.Array)
    assert out[1].y == "text"
    assert list(out["o"]) == ["b", "a"]
    assert out["o"]["a"] == 2
    back = jax_to_torch(out)
    assert back["z"][0].data_ptr() == x.data_ptr()


def test_a_plain_dataclass_crosses() -> None:
    out = torch_to_jax(Box(torch.ones(2)))
    assert isinstance(out, Box)
    assert isinstance(out.content, jax.Array)
    assert out.label == "box"


@pytest.mark.parametrize("value", [None, "text", 3, 2.5, 1j, True, b"bytes", object(), int, torch.nn.Linear])
def test_anything_else_comes_back_as_itself(value: Any) -> None:
    assert torch_to_jax(value) is value
    assert jax_to_torch(value) is value


def test_values_of_the_other_side_come_back_as_themselves() -> None:
    x, a = torch.ones(2), jnp.ones(2)
    assert torch_to_jax(a) is a
    assert jax_to_torch(x) is x


def test_devices() -> None:
    cpu = jax.devices("cpu")[0]
    assert torch_to_jax(torch.device("cpu")) == cpu
    assert jax_to_torch(cpu) == torch.device("cpu")
    assert torch_to_jax(torch.ones(2)).devices() == {cpu}
    with pytest.raises(interop.DeviceError, match="xpu"):
        torch_to_jax(torch.device("xpu"))


def test_dtypes_are_values_too() -> None:
    assert torch_to_jax(torch.bfloat16) == jnp.bfloat16
    assert jax_to_torch(np.dtype(np.float32)) is jax_to_torch(jnp.float32) is torch.float32


def test_a_function_crosses_with_every_level_on() -> None:
    f = torch_to_jax(lambda x: x.sin())
    assert float(jax.jit(jax.grad(f))(0.0 * jnp.ones(()))) == 1
    g = jax_to_torch(jnp.sin)
    x = torch.zeros((), requires_grad=True)
    g(x).backward()
    assert x.grad is not None
    assert x.grad.item() == 1


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="interop"):
        jax_to_torch(torch_to_jax({"x": torch.ones(2), "s": "text"}))
    assert not [r for r in caplog.records if r.name.startswith("interop")]


# --- several devices --------------------------------------------------------------------------------------------------


def test_a_sharded_array_is_gathered(run_python: Callable[..., str]) -> None:
    run_python(
        """
        import jax, jax.numpy as jnp, numpy as np, interop
        mesh = jax.make_mesh((4,), ("i",))
        a = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i")))
        assert len(a.sharding.device_set) == 4
        assert interop.jax_to_torch(a).tolist() == list(range(8))
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


# --- without private interfaces ---------------------------------------------------------------------------------------


PUBLIC_PROGRAM = """
import warnings; warnings.simplefilter("error"); warnings.filterwarnings("ignore", "Guards may run slower")  # 3.13.0
import jax, jax.numpy as jnp, torch, interop
from interop import as_jax, as_torch, differentiable, jittable, jax_to_torch, torch_to_jax
from interop._private import PUBLIC_ONLY
assert PUBLIC_ONLY is {public}

for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.bool, torch.complex64):
    x = torch.ones(16, dtype=dtype)
    a = torch_to_jax(x)
    assert torch.from_dlpack(a).data_ptr() == x.data_ptr(), dtype
    assert torch.equal(jax_to_torch(a), x)
assert torch_to_jax(torch.arange(32.)[1::2]).tolist() == list(range(1, 32, 2))
assert torch_to_jax(torch.ones(2, 3).T).shape == (3, 2)
assert torch_to_jax(torch.tensor([1 + 2j]).conj()).tolist() == [1 - 2j]

f = jittable(differentiable(as_torch(lambda a, n: jnp.sin(a) * n)))
x = torch.linspace(0, 1, 4, requires_grad=True)
y = f(x, 2.0)
y.sum().backward()
torch.testing.assert_close(x.grad, 2 * x.detach().cos())
torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: f(x, 2.0)))(x.detach()), x.grad)
torch.testing.assert_close(torch.compile(lambda x: f(x, 2.0), fullgraph=True, backend="aot_eager")(x.detach()), y.detach())
d = torch.ones(2, dtype=torch.float64) / 3
assert as_torch(lambda a: a * 1)(d).tolist() == d.tolist()
assert as_torch(lambda a: a)(torch.ones(2, requires_grad=False)).tolist() == [1, 1]

g = jittable(differentiable(as_jax(lambda t: (t.sin() * 2).sum())))
a = jnp.linspace(0, 1, 4)
for call in (jax.grad(g), jax.jit(jax.grad(g))):
    assert jnp.allclose(call(a), 2 * jnp.cos(a))
assert jnp.allclose(jax.vmap(g)(a), 2 * jnp.sin(a))
print("ok")
"""


@pytest.mark.parametrize("public", [False, True])
def test_public_fallbacks(run_python: Callable[..., str], public: bool) -> None:
    """The same program with the private interfaces and without them."""
    program = PUBLIC_PROGRAM.format(public=public)
    assert run_python(program, timeout=120, INTEROP_PUBLIC_ONLY="1" if public else "") == "ok\n"
