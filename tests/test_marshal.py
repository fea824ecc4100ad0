"""The plan of a call: what is a leaf, what is a container, what is static, and the way back."""

import collections
import dataclasses
import enum
import math
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensordict
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from interop import ContainerError, PrecisionError, as_jax, as_torch, differentiable, jittable
from interop._marshal import Kind, Marshaller, flatten

t, a = torch.ones(2, 3), jnp.ones(2)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Plain:
    x: Any
    tag: str = "s"


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    x: Any
    double: Any = dataclasses.field(init=False, default=None)

    def __init__(self, first: Any, second: Any) -> None:
        object.__setattr__(self, "x", first)
        object.__setattr__(self, "double", second)


@flax.struct.dataclass
class Flax:
    x: Any
    y: Any


class Eqx(eqx.Module):
    x: Any
    n: int = eqx.field(static=True)

    def __init__(self, x: Any) -> None:
        self.x, self.n = x, 3


class Colour(enum.Enum):
    RED = 1


CONTAINERS: dict[str, Any] = {
    "leaf": t,
    "tuple": (t, (), (t,)),
    "list": [t, [None, t]],
    "dict": {"b": t, "a": t},
    "mixed keys": {1: t, "a": t, (2, 3): t},
    "ordered": collections.OrderedDict([("b", t), ("a", t)]),
    "deque": collections.deque([t, t], maxlen=5),
    "namedtuple": Point(t, [t]),
    "dataclass": Plain(t),
    "dataclass with an init of its own": Own(t, t),
    "flax struct": Flax(t, t),
    "equinox": Eqx(t),
    "slice": slice(1, None, 2),
    "none": None,
    "statics": ("s", True, 1.5, Colour.RED, torch.float32, np.dtype("f4"), torch.Size([2])),
    "return type": torch.return_types.max((t, t)),
    "model output": BaseModelOutput(last_hidden_state=t),
    "batch encoding": BatchEncoding({"ids": t}),
    "tensor dict": tensordict.TensorDict({"x": t}, batch_size=[2]),
}


@pytest.mark.parametrize("tree", CONTAINERS.values(), ids=CONTAINERS)
def test_round_trip(tree: Any) -> None:
    leaves, structure = flatten(tree, numbers_static=True)
    assert all(leaf is t or isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = structure.unflatten(leaves)
    assert type(again) is type(tree)
    assert flatten(again, numbers_static=True)[1] == structure
    assert [id(x) for x in flatten(again, numbers_static=True)[0]] == [id(x) for x in leaves]


def test_the_order_of_a_dict_is_part_of_the_structure() -> None:
    one, other = flatten({"a": t, "b": t})[1], flatten({"b": t, "a": t})[1]
    assert one != other
    assert list(other.unflatten([t, t])) == ["b", "a"]


def test_equal_keys_of_other_types_are_other_structures() -> None:
    """What a dict of some keys has in common is remembered: not for keys that are equal, and rebuilt as others."""
    name, number = enum.Enum("Name", {"a": "a"}, type=str), enum.IntEnum("Number", {"one": 1})
    for keys in ((1, True, 1.0, number.one), ("a", name.a)):
        trees = [{key: torch.ones(1)} for key in keys]
        structures = [flatten(tree)[1] for tree in trees for _ in range(2)]
        assert len(set(structures)) == len(keys)
        for key, structure in zip(keys, structures[::2], strict=True):
            (rebuilt,) = structure.unflatten([torch.ones(1)])
            assert type(rebuilt) is type(key)
            assert rebuilt == key


def test_details_of_containers_survive() -> None:
    factory = collections.defaultdict(list, {"k": t})
    again = flatten(factory)[1].unflatten([t])
    assert again.default_factory is list
    assert flatten(collections.deque([t], maxlen=3))[1].unflatten([t]).maxlen == 3
    assert flatten(Own(t, a))[1].unflatten([a, t]).double is t


trees = st.recursive(
    st.sampled_from([t, a, np.ones(1), None, "s", 2.0, True]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3), st.booleans()), inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Plain, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_is_itself_after_a_round_trip(tree: Any) -> None:
    leaves, structure = flatten(tree)
    again_leaves, again = flatten(structure.unflatten(leaves))
    assert again == structure
    assert hash(again) == hash(structure)
    assert [id(x) for x in again_leaves] == [id(x) for x in leaves]
    assert len(structure.paths()) == len(leaves) == len(structure.kinds)


# --- leaves and statics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (t, Kind.TENSOR),
        (torch.nn.Parameter(t), Kind.TENSOR),
        (a, Kind.ARRAY),
        (np.ones(1), Kind.NUMPY),
        (np.float32(1), Kind.NUMPY),
        (1, Kind.NUMBER),
        (1.5, Kind.NUMBER),
        (1j, Kind.NUMBER),
        (jax.random.key(0), Kind.KEY),
    ],
    ids=str,
)
def test_kinds(leaf: Any, kind: Kind) -> None:
    assert flatten(leaf)[1].kinds == (kind,)


def test_statics_are_told_apart_by_type_and_bits() -> None:
    values = [1, True, 1.0, 0.0, -0.0, 1 + 0j, "1", None, math.nan]
    structures = [flatten([value], numbers_static=True)[1] for value in values]
    assert len(set(structures)) == len(values)
    assert flatten(math.nan, numbers_static=True)[1] == flatten(float("nan"), numbers_static=True)[1]


def test_an_equal_hash_does_not_hide_a_tensor() -> None:
    """A dataclass without `__eq__` is hashable: as a static it would never be converted."""

    @dataclasses.dataclass(eq=False)
    class Config:
        w: torch.Tensor

    assert flatten(Config(t))[0] == [t]


class Opaque:
    def __init__(self, **inside: Any) -> None:
        self.__dict__.update(inside)


@pytest.mark.parametrize("inside", [{"w": t}, {"w": [a]}, {"w": {"k": (np.ones(1),)}}], ids=["bare", "list", "nested"])
def test_an_opaque_object_hides_nothing(inside: dict[str, Any]) -> None:
    with pytest.raises(ContainerError, match="hides"):
        flatten({"cfg": Opaque(**inside)})
    assert flatten(Opaque(n=3))[0] == []


def test_what_is_not_hashable_is_refused() -> None:
    with pytest.raises(ContainerError, match="neither a value, a known container, nor hashable"):
        flatten({1, 2})


# --- calls ------------------------------------------------------------------------------------------------------------


def f(x: Any, w: Any = None, *rest: Any, scale: float = 1.0, **others: Any) -> Any:
    return x


def test_a_call_comes_back_as_the_function_is_called() -> None:
    marshaller = Marshaller(f, name="f")
    leaves, spec = marshaller.flatten_call((t, {"k": [t]}, t), {"scale": 3.0, "z": t})
    assert spec.unflatten(leaves) == ((t, {"k": [t]}, t), {"scale": 3.0, "z": t})
    assert [spec.path(i) for i in range(5)] == ["x", "w['k'][0]", "rest[0]", "scale", "z"]
    assert spec.argnames == ("x", "w", "rest", "scale", "z")


def test_one_spec_for_each_structure() -> None:
    marshaller = Marshaller(f, name="f")
    spec = marshaller.flatten_call((t,), {})[1]
    assert marshaller.flatten_call((torch.zeros(7),), {})[1] is spec
    scaled = marshaller.flatten_call((t,), {"scale": 2.0})[1]
    assert marshaller.flatten_call((t,), {"scale": 3.0})[1] is scaled is not spec  # a default is the function's own
    assert marshaller.flatten_call((t, "static"), {})[1] is not spec
    assert marshaller.flatten_call((t, 1), {})[1] is not marshaller.flatten_call((t, True), {})[1]


def test_a_call_of_leaves_and_dicts_is_known_by_its_types() -> None:
    """Whatever else may bind to the same parameters: defaults, keywords, other types, other keys."""

    def g(params: Any, x: Any = None, scale: Any = 2.0, mode: Any = "sum") -> Any:
        return params, x, scale, mode

    def called(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = marshaller.flatten_call(args, kwargs)
        positional, keywords = spec.unflatten(leaves)
        return g(*positional, **keywords)

    marshaller = Marshaller(g, name="g")
    u, d, swapped = torch.zeros(3), {"a": t, "b": t}, {"b": t, "a": t}
    for _ in range(3):
        assert called(d, u, 3.0) == (d, u, 3.0, "sum")
        assert called(d, u, True) == (d, u, True, "sum")
        assert called(d, u, 3.0, "mean") == (d, u, 3.0, "mean")
        assert called(d, u) == (d, u, 2.0, "sum")
        assert called(d) == called(params=d) == called(d, None) == (d, None, 2.0, "sum")
        assert called(params=d, scale=4.0) == (d, None, 4.0, "sum")
        assert called(t, u, 3.0) == (t, u, 3.0, "sum")
        assert list(called(swapped, u, 3.0)[0]) == ["b", "a"]
        assert [type(key) for key in called({1: t}, u, 3.0)[0]] == [int]
        assert [type(key) for key in called({True: t}, u, 3.0)[0]] == [bool]
        assert called({"a": t, "b": "s"}, u, 3.0)[0]["b"] == "s"
        assert called({"a": {"b": t}}, u, 3.0)[0] == {"a": {"b": t}}
        for wrong in ((), (d, u, 3.0, "sum", 1)):
            with pytest.raises(TypeError, match="g"):
                called(*wrong)
    assert {len(shape) for shape in marshaller.shallow} == {1, 2, 3}
    static = Marshaller(lambda n, scale=2: None, name="static", static_argnames=("n",))
    for n in (2, 5, 2):
        leaves, spec = static.flatten_call((n,), {})
        assert spec.unflatten(leaves) == ((n,), {})


def test_the_cache_of_specs_is_bounded() -> None:
    marshaller = Marshaller(f, name="f", capacity=8)
    for i in range(50):
        marshaller.flatten_call((t, f"static {i}"), {})
    assert len(marshaller.specs) == 8


def test_static_argnames() -> None:
    marshaller = Marshaller(f, name="f", static_argnames=("w", "scale"))
    leaves, spec = marshaller.flatten_call((t, 3), {"scale": 2.0})
    assert leaves == [t]
    assert spec.unflatten(leaves) == ((t, 3), {"scale": 2.0})
    with pytest.raises(ContainerError, match="w: "):
        marshaller.flatten_call((t, [1]), {})


def test_a_result_with_names_leaves_a_compiled_program() -> None:
    """As itself, and with its names in JAX's paths."""
    f = differentiable(jittable(as_jax(lambda x: torch.sort(x))))
    x = jnp.array([2.0, 1.0, 3.0])
    for call in (f, jax.jit(f), lambda x: jax.lax.map(f, x[None]), jax.jit(lambda x: jax.vmap(f)(x[None]))):
        found = call(x)
        assert type(found) is torch.return_types.sort
        assert found.values.ravel().tolist() == [1, 2, 3]
        assert found.indices.ravel().tolist() == [1, 0, 2]
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(found)] == [".values", ".indices"]
    assert jax.jit(jax.grad(lambda x: (f(x).values * jnp.arange(3)).sum()))(x).tolist() == [1, 0, 2]
    with pytest.raises(PrecisionError, match=r"result\.values: a float64 result"):
        as_jax(lambda x: torch.sort(x.double()))(x)


def test_a_model_output_leaves_as_itself() -> None:
    double = as_torch(lambda out: BaseModelOutput(last_hidden_state=2 * out.last_hidden_state))
    again = double(BaseModelOutput(last_hidden_state=t))
    assert isinstance(again, BaseModelOutput)
    assert torch.equal(again.last_hidden_state, 2 * t)
