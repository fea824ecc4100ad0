"""What there is on this machine, and what to do about it: `python -m interop`."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import operator
import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import torch

import interop
from interop._errors import named
from interop._leaf import x64_enabled
from interop._private import PUBLIC_ONLY
from interop._private import jax as jax_private
from interop._private import torch as torch_private

DISTRIBUTION = "interop-torch-jax"
FINE = "nothing to do"


class Line(NamedTuple):
    """One line of the report: what is looked at, what there is, and what to do about it."""

    name: str
    found: str
    advice: str


def main() -> int:
    """Print the report."""
    lines = [line for section in SECTIONS for line in _asked(section)]
    name, found = (max(len(line[column]) for line in lines) for column in (0, 1))
    for line in lines:
        print(f"{line.name:{name}}  {line.found:{found}}  {line.advice}")
    return 0


def _asked(section: Callable[[], list[Line]]) -> list[Line]:
    """The lines of a section; what it raises is a line too."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        return [Line(section.__name__.replace("_", " "), "not known", named(error))]


# --- versions ---------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "jax", "jaxlib", "numpy", "wrapt")


def versions() -> list[Line]:
    """The versions of what the library stands on, and whether they are supported."""
    wanted = _requirements()
    return [
        _version("python", platform.python_version(), wanted.get("python", "")),
        *(_version(name, _installed(name), wanted.get(name, "")) for name in PACKAGES),
        Line("interop", interop.__version__, FINE),
    ]


def _version(name: str, found: str | None, wanted: str) -> Line:
    if found is None:
        return Line(name, "missing", f"pip install '{name}{wanted}'")
    if not wanted:
        return Line(name, found, "not known whether it is supported")
    if _is_within(found, wanted):
        return Line(name, found, f"{FINE}: {wanted} is supported")
    way_out = "use another Python" if name == "python" else f"pip install '{name}{wanted}'"
    return Line(name, found, f"not supported, {wanted} is: {way_out}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """The versions that are supported, by package; from a clone that is not installed, by its `pyproject.toml`."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        python, every = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).parent.parent / "pyproject.toml"
        if not file.exists():
            return {}
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        python, every = project["requires-python"], project["dependencies"]
    matches = (re.fullmatch(r"([\w-]+)\s*([^;\[]*)", requirement) for requirement in every)
    return {"python": python} | {match[1]: _ordered(match[2]) for match in matches if match}


def _ordered(wanted: str) -> str:
    """The least version first."""
    return ",".join(sorted(wanted.strip().split(","), reverse=True))


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def _is_within(version: str, wanted: str) -> bool:
    """Whether a version is in a range like `>=2.13,<3`, by its numbers alone."""
    bounds = re.findall(r"([<>=!]=?)\s*([\d.]+)", wanted)
    return all(_COMPARE[sign](_numbers(version), _numbers(bound)) for sign, bound in bounds)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in found[0].split(".")] if found else []
    return tuple([*numbers, 0, 0, 0, 0][:4])


# --- the library ------------------------------------------------------------------------------------------------------


def fast_paths() -> list[Line]:
    """The private names of either framework that are in use."""
    why = "unset INTEROP_PUBLIC_ONLY" if PUBLIC_ONLY else "slower, not wrong: install a version that is supported"
    lines: list[Line] = []
    for name, paths in (("torch", torch_private.fast_paths()), ("jax", jax_private.fast_paths())):
        missing = [what for what, there in paths.items() if not there]
        found = f"{len(paths) - len(missing)} of {len(paths)} active"
        lines.append(Line(f"fast paths, {name}", found, f"{why} (without: {', '.join(missing)})" if missing else FINE))
    return lines


# --- devices ----------------------------------------------------------------------------------------------------------


def devices() -> list[Line]:
    """What each framework computes on."""
    of_torch = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    of_jax = jax.devices()
    on_gpu = any(device.platform in ("gpu", "cuda") for device in of_jax)
    advice = FINE
    if of_torch and not on_gpu:
        advice = f"tensors on a GPU can't cross: pip install 'jax[cuda{_major(str(torch.version.cuda))}]'"
    elif on_gpu and not of_torch:
        advice = "arrays on a GPU can't cross: install a torch with CUDA, or set JAX_PLATFORMS=cpu"
    return [
        Line("devices, torch", ", ".join(["cpu", *of_torch]), advice),
        Line("devices, jax", ", ".join(map(str, of_jax)), advice),
    ]


def cuda() -> list[Line]:
    """Whether both frameworks were built for the same CUDA."""
    of_torch = torch.version.cuda
    of_jax = next((n for n in ("13", "12") if _installed(f"jax-cuda{n}-plugin")), None)
    advice = FINE
    if of_torch and of_jax and _major(of_torch) != of_jax:
        advice = f"they disagree, and load two sets of libraries: pip install 'jax[cuda{_major(of_torch)}]'"
    return [Line("CUDA", f"torch {of_torch or 'without'}, jax {of_jax or 'without'}", advice)]


def _major(version: str) -> str:
    return version.partition(".")[0]


# --- settings ---------------------------------------------------------------------------------------------------------


def x64() -> list[Line]:
    """Whether JAX keeps 64 bits."""
    on = x64_enabled()
    off = "JAX_ENABLE_X64=1 lets JAX keep 64 bits; into torch, functions of 64-bit floats run in 64 bits all the same"
    return [Line("x64", "on" if on else "off", FINE if on else off)]


def memory() -> list[Line]:
    """Whether JAX takes most of a GPU's memory when it starts."""
    found = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    is_off = (found or "").lower() in ("false", "0")
    advice = "on a GPU, XLA_PYTHON_CLIENT_PREALLOCATE=false leaves torch the memory that JAX does not use"
    return [Line("preallocation", "not set" if found is None else found, FINE if is_off else advice)]


def processes() -> list[Line]:
    """How child processes are started."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    advice = "a forked child of a process that runs JAX can't cross: DataLoader(..., multiprocessing_context='spawn')"
    return [Line("start method", method, advice if method == "fork" else FINE)]


SECTIONS = (versions, fast_paths, devices, cuda, x64, memory, processes)

if __name__ == "__main__":
    sys.exit(main())
