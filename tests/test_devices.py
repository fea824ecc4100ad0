"""A torch function in JAX on several devices, and in several processes.

A process of its own has the devices: it imports this file, runs what a table says under a time limit, and prints what
it found. Everything is compared with the same mathematics in JAX, refusals included.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torch.func import functional_call

from interop import as_jax, as_torch, differentiable, jittable
from together import processes_at_once

Fn = Callable[..., Any]
TESTS = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
DEVICES = 8


def on_devices(n: int) -> dict[str, str]:
    """By which a process sees its CPU as several devices."""
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"}
    return ENVIRONMENT | devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # a hundred programs, each run once


def levels(fn: Fn) -> Fn:
    """The torch function as a JAX function, with every level on."""
    return differentiable(jittable(as_jax(fn)))


def outcome(call: Callable[[], Any]) -> Any:
    """The numbers of a result, or the type of the error and its text."""
    try:
        return [np.asarray(x).tolist() for x in jax.tree.leaves(call())]
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)[:300]}


def agree(got: Any, expected: Any) -> bool:
    """Two outcomes: close numbers, or the same type of error."""
    if isinstance(got, dict) or isinstance(expected, dict):
        return isinstance(got, dict) and isinstance(expected, dict) and got["raised"] == expected["raised"]
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(got, expected, strict=True)]
    return all(a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def report(found: dict[str, Callable[[], Any]]) -> None:
    """Print what each gives, a line each."""
    for name, call in found.items():
        print(json.dumps([name, call()]), flush=True)


# --- one layer in both frameworks -------------------------------------------------------------------------------------

layer = levels(lambda x, w: torch.tanh(x @ w))
centred = levels(lambda x, w: torch.tanh(x @ w) - x.mean(0, keepdim=True) @ w)


def layer_in_jax(x: Any, w: Any) -> Any:
    """Of each row alone: devices may share the rows."""
    return jnp.tanh(x @ w)


def centred_in_jax(x: Any, w: Any) -> Any:
    """Of all rows together."""
    return jnp.tanh(x @ w) - x.mean(0, keepdims=True) @ w


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


@functools.cache
def mesh(kind: AxisType = AxisType.Auto) -> Any:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), ("i",), axis_types=(kind,))


def point(kind: AxisType = AxisType.Auto) -> tuple[jax.Array, jax.Array]:
    """A batch that the devices share, and a weight that each of them has."""
    x, w = random(16, 3), random(3, 5)
    return jax.device_put(x, NamedSharding(mesh(kind), P("i"))), jax.device_put(w, NamedSharding(mesh(kind), P()))


# --- shard_map --------------------------------------------------------------------------------------------------------

# form -> the program of a layer, by a `shard_map` that has only the specs of its results to be given
FORMS: dict[str, Callable[[Fn, Fn], Fn]] = {
    "forward": lambda f, mapped: mapped(f, P("i")),
    "forward and psum": lambda f, mapped: mapped(lambda x, w: jax.lax.psum(f(x, w).sum(), "i"), P()),
    "gradient outside": lambda f, mapped: jax.grad(lambda x, w: (mapped(f, P("i"))(x, w) ** 2).sum(), (0, 1)),
    "gradient outside of a psum": lambda f, mapped: jax.grad(mapped(lambda x, w: jax.lax.psum((f(x, w) ** 2).sum(), "i"), P()), (0, 1)),
    "gradient inside": lambda f, mapped: mapped(jax.grad(lambda x, w: (f(x, w) ** 2).sum()), P("i")),
    "gradient inside and pmean": lambda f, mapped: mapped(lambda x, w: jax.lax.pmean(jax.grad(lambda w: (f(x, w) ** 2).sum())(w), "i"), P()),
    "gradient inside in a varying weight": lambda f, mapped: mapped(lambda x, w: jax.lax.pmean(jax.grad(lambda w: (f(x, w) ** 2).sum())(jax.lax.pcast(w, "i", to="varying")), "i"), P()),
}  # fmt: skip
WAYS: dict[str, Callable[[Fn], Fn]] = {"eagerly": lambda f: f, "compiled": jax.jit}


def by_shard_map(form: str, way: str, kind: AxisType, check: bool, f: Fn) -> Any:
    def mapped(fn: Fn, out_specs: Any) -> Fn:
        return jax.shard_map(fn, mesh=mesh(kind), in_specs=(P("i"), P()), out_specs=out_specs, check_vma=check)

    return WAYS[way](FORMS[form](f, mapped))(*point(kind))


SHARD_MAP: dict[str, Callable[[Fn], Any]] = {
    f"{form}, {way}, {kind.name} axes, {'checked' if check else 'not checked'}": functools.partial(by_shard_map, form, way, kind, check)
    for form in FORMS
    for way in WAYS
    for kind in (AxisType.Auto, AxisType.Explicit)
    for check in (True, False)
    if check or way == "compiled"  # eagerly each operation is a program of its own: slow, in JAX
}  # fmt: skip


def partly_manual(kind: AxisType, derivative: bool, f: Fn) -> Any:
    """One axis of the mesh is mapped, the other is not."""
    two = jax.make_mesh((DEVICES // 2, 2), ("i", "j"), axis_types=(kind,) * 2)
    x = jax.device_put(random(16, 4), NamedSharding(two, P("i", "j")))
    w = jax.device_put(random(4, 5), NamedSharding(two, P()))
    mapped = jax.shard_map(f, mesh=two, in_specs=(P("i"), P()), out_specs=P("i"), axis_names={"i"})
    return jax.jit(jax.grad(lambda x, w: (mapped(x, w) ** 2).sum(), (0, 1)) if derivative else mapped)(x, w)


PARTLY: dict[str, Callable[[Fn], Any]] = {
    f"{'gradient' if derivative else 'forward'}, partly manual, {kind.name} axes": functools.partial(partly_manual, kind, derivative)
    for derivative in (False, True)
    for kind in (AxisType.Auto, AxisType.Explicit)
}  # fmt: skip


# --- pmap -------------------------------------------------------------------------------------------------------------


def halves() -> tuple[jax.Array, jax.Array]:
    """A batch for each device, and the weight."""
    return random(16, 3).reshape(DEVICES, 2, 3), random(3, 5)


def loss(f: Fn, x: Any, w: Any) -> Any:
    return (f(x, w) ** 2).sum()


PMAP: dict[str, Callable[[Fn], Any]] = {
    "pmap": lambda f: jax.pmap(f, in_axes=(0, None))(*halves()),
    "pmap of a gradient, and pmean": lambda f: jax.pmap(lambda x, w: jax.lax.pmean(jax.grad(lambda w: loss(f, x, w))(w), "i"), axis_name="i", in_axes=(0, None))(*halves()),
    "gradient of pmap": lambda f: jax.grad(lambda x, w: loss(jax.pmap(f, in_axes=(0, None)), x, w), (0, 1))(*halves()),
    "gradient of pmap of a psum": lambda f: jax.grad(lambda x: loss(jax.pmap(lambda x, w: jax.lax.psum(f(x, w), "i"), axis_name="i", in_axes=(0, None)), x, halves()[1]))(halves()[0]),
    "pmap of vmap": lambda f: jax.pmap(jax.vmap(f, (0, None)), in_axes=(0, None))(random(DEVICES, 3, 2, 3), random(3, 5)),
    "pmap of scan": lambda f: jax.pmap(lambda x: jax.lax.scan(lambda c, _: (f(c, random(3, 3)), None), x, None, length=3)[0])(halves()[0]),
    "vmap with psum": lambda f: jax.vmap(lambda x, w: jax.lax.psum(f(x, w), "i"), (0, None), axis_name="i")(*halves()),
    "gradient of vmap with psum": lambda f: jax.grad(lambda x: loss(jax.vmap(lambda x, w: jax.lax.psum(f(x, w), "i"), (0, None), axis_name="i"), x, halves()[1]))(halves()[0]),
    "vmap over a mesh axis of shard_map": lambda f: jax.jit(jax.vmap(jax.shard_map(f, mesh=mesh(), in_specs=(P(), P()), out_specs=P()), (0, None), spmd_axis_name="i"))(*halves()),
}  # fmt: skip


# --- without shard_map ------------------------------------------------------------------------------------------------

# The devices' shares are gathered, and the function computes on the whole.
GATHERED: dict[str, Callable[[Fn], Any]] = {
    "compiled": lambda f: jax.jit(f)(*point()),
    "gradient, compiled": lambda f: jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(*point()),
    "compiled, Explicit axes": lambda f: jax.jit(f)(*point(AxisType.Explicit)),
    "gradient, compiled, Explicit axes": lambda f: jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(*point(AxisType.Explicit)),
}  # fmt: skip
EAGER: dict[str, Callable[[Fn], Any]] = {
    "call": lambda f: f(*point()),
    "a share beside an array on one device": lambda f: f(point()[0], random(3, 5)),
    "gradient": lambda f: jax.grad(functools.partial(loss, f), (0, 1))(*point()),
    "pull-back": lambda f: (lambda out, pull: (out, pull(out)))(*jax.vjp(f, *point())),
    "jvp": lambda f: jax.jvp(f, point(), point()),
    "vmap": lambda f: jax.vmap(lambda x, w: f(x[None], w), (0, None))(*point()),
    "Hessian": lambda f: jax.hessian(lambda w: loss(f, point()[0], w))(point()[1]),
    "call in the context of the mesh": lambda f: in_context(f, *point()),
}  # fmt: skip


def in_context(f: Fn, *args: Any) -> Any:
    with jax.set_mesh(mesh()):
        return f(*args)


def warned(call: Callable[[], Any]) -> int:
    """How often a call says that the array is on several devices, naming the way out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.block_until_ready(call())
    return sum("several devices" in str(w.message) and "jax.shard_map" in str(w.message) for w in caught)


def shared(fn: Fn) -> Any:
    """On each device's share alone."""
    return jax.shard_map(fn, mesh=mesh(), in_specs=(P("i"), P()), out_specs=P("i"))(*point())


WARNINGS: dict[str, tuple[Callable[[], Any], int]] = {
    "inside shard_map": (lambda: jax.jit(lambda: shared(layer))(), 0),
    "inside shard_map, eagerly": (lambda: shared(layer), 0),
    "inside pmap": (lambda: jax.pmap(layer, in_axes=(0, None))(*halves()), 0),
    "on one of the devices": (lambda: centred(random(16, 3), random(3, 5)), 0),
    "on several": (lambda: centred(*point()), 1),
    "again": (lambda: centred(*point()), 0),
    "compiled": (lambda: jax.jit(centred)(*point()), 0),
}


def places(*arrays: Any) -> list[list[Any]]:
    """Where arrays are: on how many devices, and whether each has the whole."""
    return [[sorted(d.id for d in a.devices()), a.sharding.is_fully_replicated] for a in arrays]


PLACES: dict[str, Callable[[], Any]] = {
    "on all": lambda: places(centred(*point())),
    "on another": lambda: places(centred(*jax.device_put((random(16, 3), random(3, 5)), jax.devices()[3]))),
    "on another, a gradient": lambda: places(jax.grad(lambda x, w: (centred(x, w) ** 2).sum())(*jax.device_put((random(16, 3), random(3, 5)), jax.devices()[3]))),
    "on another, compiled": lambda: places(jax.jit(centred)(*jax.device_put((random(16, 3), random(3, 5)), jax.devices()[3]))),
}  # fmt: skip


# --- one module on many threads ---------------------------------------------------------------------------------------

network = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))


def network_in_jax(params: Any, x: Any) -> Any:
    """The same in JAX."""
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["2.weight"].T + params["2.bias"]


MODULES: dict[str, Fn] = {
    "a module": levels(network),
    "a function that calls a module": levels(lambda params, x: functional_call(network, params, (x,))),
}
ASKED: dict[str, Callable[[Fn], Fn]] = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(lambda params, x: (f(params, x) ** 2).sum()),
    "Hessian by vector": lambda f: lambda params, x: jax.jvp(jax.grad(lambda p: (f(p, x) ** 2).sum()), (params,), (params,))[1],
}  # fmt: skip


def each_with_its_own(kind: str, asked: str, rounds: int) -> list[Any]:
    """How many results were wrong where every device has other parameters, and whether the module is as it was."""
    params = {name: random(DEVICES, *p.shape) / 4 for name, p in network.named_parameters()}
    x = random(DEVICES, 64, 32)
    before = {name: (p, p.detach().clone()) for name, p in network.named_parameters()}

    def everywhere(fn: Fn) -> Fn:
        def one(params: Any, x: Any) -> Any:
            return jax.tree.map(lambda out: out[None], fn(*jax.tree.map(lambda a: a[0], (params, x))))

        return jax.jit(jax.shard_map(one, mesh=mesh(), in_specs=P("i"), out_specs=P("i")))

    run = everywhere(ASKED[asked](MODULES[kind]))
    expected = jax.tree.leaves(everywhere(ASKED[asked](network_in_jax))(params, x))
    wrong = 0
    for _ in range(rounds):
        got = jax.tree.leaves(run(params, x))
        wrong += not all(np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, expected, strict=True))
    after = dict(network.named_parameters())
    return [wrong, all(after[name] is p and torch.equal(p.detach(), value) for name, (p, value) in before.items())]


# --- the process with eight devices -----------------------------------------------------------------------------------

ROUNDS = 40
ON_SHARES = SHARD_MAP | PMAP
ON_THE_WHOLE = PARTLY | GATHERED | {f"eager {name}": program for name, program in EAGER.items()}


def eight_devices() -> None:
    """Run every table, and print a line for each row."""
    threads: set[int] = set()
    where = levels(lambda x, w: (threads.add(threading.get_ident()), x @ w)[1])
    report({f"warning {name}": functools.partial(warned, call) for name, (call, _) in WARNINGS.items()})
    report({f"place {name}": call for name, call in PLACES.items()})
    compared = {name: (program, layer, jax.jit(layer_in_jax)) for name, program in ON_SHARES.items()}
    compared |= {name: (program, centred, jax.jit(centred_in_jax)) for name, program in ON_THE_WHOLE.items()}
    report({
        name: lambda program=program, fns=fns: [outcome(lambda: program(fn)) for fn in fns]
        for name, (program, *fns) in compared.items()
    })  # fmt: skip
    report({
        f"{kind}: {asked}": functools.partial(each_with_its_own, kind, asked, ROUNDS)
        for kind in MODULES
        for asked in ASKED
    })  # fmt: skip
    report({"threads": lambda: (jax.block_until_ready(jax.jit(lambda: shared(where))()), len(threads))[1]})


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process with eight devices has to say, by name."""
    command = [sys.executable, "-W", "ignore", "-c", "import test_devices; test_devices.eight_devices()"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=TESTS,
        env=os.environ | on_devices(DEVICES),
        check=False,
    )
    return read(done.stdout + done.stderr, done.returncode)


def read(output: str, code: Any) -> dict[str, Any]:
    """What a process has reported; with how it ended."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    return dict(lines) | {"exit": code, "tail": output[-2000:]}


def of(found: dict[str, Any], name: str) -> Any:
    """What was found under this name."""
    assert name in found, f"not reached, exit status {found['exit']}\n{found['tail']}"
    return found[name]


def test_the_process_comes_to_an_end(found: dict[str, Any]) -> None:
    assert found["exit"] == 0, found["tail"]


@pytest.mark.parametrize("program", SHARD_MAP)
def test_shard_map(found: dict[str, Any], program: str) -> None:
    """Values, gradients and refusals are JAX's, for either kind of mesh, with and without JAX's check."""
    got, expected = of(found, program)
    assert agree(got, expected), (got, expected)


def test_shard_map_runs_somewhere(found: dict[str, Any]) -> None:
    """The table is not one of refusals; and the devices work on threads of their own."""
    assert sum(isinstance(of(found, program)[1], list) for program in SHARD_MAP) >= 36
    assert of(found, "threads") > 1


UNMAPPED = pytest.mark.xfail(
    strict=True, reason="a cotangent has not the sharding of its primal on the axis that is not mapped"
)


@pytest.mark.parametrize(
    "program",
    [pytest.param(n, marks=UNMAPPED if n == "gradient, partly manual, Explicit axes" else ()) for n in PARTLY],
)
def test_shard_map_of_one_axis_of_two(found: dict[str, Any], program: str) -> None:
    got, expected = of(found, program)
    assert agree(got, expected), (got, expected)


@pytest.mark.parametrize("program", PMAP)
def test_pmap(found: dict[str, Any], program: str) -> None:
    """And `vmap` with an axis of a name, which collects over examples as `pmap` does over devices."""
    got, expected = of(found, program)
    assert agree(got, expected), (got, expected)


@pytest.mark.parametrize("program", GATHERED)
def test_a_compiled_program_outside_shard_map(found: dict[str, Any], program: str) -> None:
    """The function gets the whole array: it may compute a mean over what is shared out."""
    got, expected = of(found, program)
    assert agree(got, expected), (got, expected)


@pytest.mark.parametrize("program", EAGER)
def test_an_eager_call_outside_shard_map(found: dict[str, Any], program: str) -> None:
    got, expected = of(found, f"eager {program}")
    assert agree(got, expected), (got, expected)


def test_one_warning_outside_shard_map_and_none_inside(found: dict[str, Any]) -> None:
    counts = {name: of(found, f"warning {name}") for name in WARNINGS}
    assert counts == {name: expected for name, (_, expected) in WARNINGS.items()}


@pytest.mark.parametrize(("place", "expected"), [
    ("on all", [list(range(DEVICES)), True]),
    ("on another", [[3], True]),
    ("on another, a gradient", [[3], True]),
    ("on another, compiled", [[3], True]),
])  # fmt: skip
def test_a_result_is_where_its_arguments_are(found: dict[str, Any], place: str, expected: list[Any]) -> None:
    """On all devices of their mesh, each with the whole; or on the one device that they are on."""
    assert of(found, f"place {place}") == [expected]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", MODULES)
def test_one_module_on_many_threads(found: dict[str, Any], kind: str, asked: str) -> None:
    """Every device computes with its own parameters, and the module keeps its own."""
    assert of(found, f"{kind}: {asked}") == [0, True]


# --- JAX in torch in JAX ----------------------------------------------------------------------------------------------

inner = differentiable(jittable(as_torch(lambda t: jnp.tanh(t @ t / 500))))
outer = levels(lambda t: inner(t) + t)


def outer_in_jax(t: Any) -> Any:
    """The same without torch in between."""
    return jnp.tanh(t @ t / 500) + t


def everywhere(f: Fn) -> Fn:
    """On every device, with an array of its own."""
    return jax.shard_map(lambda a: f(a[0])[None], mesh=mesh(), in_specs=P("i"), out_specs=P("i"))


# program, and how often it is run
NESTED: dict[str, tuple[Callable[[Fn], Fn], int]] = {
    "on one of two devices": (lambda f: jax.jit(lambda a: f(a[0])), 30),
    "on both": (lambda f: jax.jit(everywhere(f)), 30),
    "on both, between other operations": (lambda f: jax.jit(lambda a: everywhere(f)(a @ a / 500) @ a), 30),
    "gradient on both": (lambda f: jax.jit(jax.grad(lambda a: everywhere(f)(a).sum())), 300),
}


def nested() -> None:
    """Print, by program, how many runs were right or were refused for the reason that there is."""
    a = random(2, 500, 500)
    for name, (program, rounds) in NESTED.items():
        run, expected = program(outer), program(outer_in_jax)(a)
        right = refused = 0
        for _ in range(rounds):
            try:
                right += bool(jnp.allclose(run(a), expected, rtol=1e-3, atol=1e-3))
            except Exception as error:  # under jit the type is JAX's own
                if "NestedError" not in str(error) or "jax_cpu_enable_async_dispatch" not in str(error):
                    raise
                refused += 1
        print(json.dumps([name, right + refused]), flush=True)


def warned_when_compiled() -> list[int]:
    """How often, by two programs with the same function."""
    x = jax.device_put(random(16, 3), NamedSharding(mesh(), P("i")))
    return [warned(lambda: jax.jit(lambda x: centred(x, random(3, 5)) * 2)(x)) for _ in range(2)]


def test_jax_in_torch_in_jax_on_two_devices_never_hangs(run_python: Callable[..., str]) -> None:
    """Right, or refused by a message that names the switch. And a program outside `shard_map` says so once."""
    program = "import test_devices as t; t.nested(); print(t.warned_when_compiled())"
    *lines, warnings_ = run_python(program, timeout=100, **on_devices(2)).splitlines()
    assert dict(map(json.loads, lines)) == {name: rounds for name, (_, rounds) in NESTED.items()}
    assert json.loads(warnings_) == [1, 0]


# --- two processes ----------------------------------------------------------------------------------------------------


def across(f: Fn, x: Any, w: Any) -> Any:
    """The loss over all devices of all processes."""
    local = lambda x, w: jax.lax.psum(loss(f, x, w), "i")
    return jax.shard_map(local, mesh=mesh(), in_specs=(P("i"), P()), out_specs=P())(x, w)


def one_of_two_processes() -> None:
    """Print what came of it, and errors: against what one process alone computes in JAX."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(os.environ["MEET"], 2, int(os.environ["RANK"]))
    local = [np.asarray(a) for a in (random(16, 3), random(3, 5))]
    shared_out = [
        jax.make_array_from_callback(v.shape, NamedSharding(mesh(), spec), v.__getitem__)
        for v, spec in zip(local, (P("i"), P()), strict=True)
    ]
    rows: list[int] = []
    counted = levels(lambda x, w: (rows.append(len(x)), torch.tanh(x @ w))[1])

    def error(got: Callable[..., Any], expected: Callable[..., Any]) -> float:
        mine = np.asarray(jax.jit(got)(*shared_out).addressable_data(0))
        return float(np.abs(mine - np.asarray(expected(*local))).max())

    value, gradient = functools.partial(across, counted), functools.partial(loss, layer_in_jax)
    report({
        "devices": jax.device_count,
        "value": lambda: error(value, gradient),
        "rows": lambda: rows[-2:],
        "gradient": lambda: error(jax.grad(value, 1), jax.grad(gradient, 1)),
        "gradient outside shard_map": lambda: error(
            jax.grad(functools.partial(loss, centred), 1), jax.grad(functools.partial(loss, centred_in_jax), 1)
        ),
        "an eager call": lambda: outcome(lambda: centred(*shared_out)),
        "an eager gradient": lambda: outcome(lambda: jax.grad(functools.partial(loss, centred), 1)(*shared_out)),
        "after that": lambda: error(value, gradient),
    })  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes with two devices found, by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", "-c", "import test_devices; test_devices.one_of_two_processes()"]
    logs = [tmp_path_factory.mktemp("ranks") / "log" for _ in range(2)]
    environments = [os.environ | on_devices(2) | {"MEET": meet, "RANK": str(rank)} for rank in range(2)]
    codes = processes_at_once(command, environments, logs, cwd=TESTS, timeout=60)
    return [read(log.read_text(), code) for log, code in zip(logs, codes, strict=True)]


def test_two_processes(ranks: list[dict[str, Any]]) -> None:
    """Values and gradients are right in both; through `shard_map` each computes for its own devices alone."""
    for rank in ranks:
        assert rank["exit"] == 0, rank["tail"]
        assert of(rank, "devices") == 4
        assert of(rank, "rows") == [4, 4]
        for name in ("value", "gradient", "gradient outside shard_map", "after that"):
            assert of(rank, name) < 1e-4, name


@pytest.mark.parametrize("asked", ["an eager call", "an eager gradient"])
def test_an_eager_call_on_what_another_process_has_is_refused(ranks: list[dict[str, Any]], asked: str) -> None:
    """This one can't see it, and says what to use instead."""
    for rank in ranks:
        got = of(rank, asked)
        assert isinstance(got, dict), got
        assert got["raised"] == "DeviceError"
        assert "jax.jit" in got["text"]
