"""The public face, the arrows between the files, and what importing the library does not do."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import interop

PACKAGE = Path(interop.__file__).parent

FACE = {
    # decorators
    "as_jax",
    "as_torch",
    "differentiable",
    "jittable",
    # values
    "jax_to_torch",
    "torch_to_jax",
    # modules
    "WrappedJaxFunction",
    "WrappedJaxScalarFunction",
    "make_functional",
    "torch_module_to_jax",
    # types of other libraries
    "register_leaf",
    # reports
    "explain",
    # types
    "Crossed",
    "SupportsJax",
    "SupportsTorch",
    # errors
    "AbstractEvalError",
    "ContainerError",
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
    "UnsupportedError",
}


def test_the_face_is_what_the_list_says() -> None:
    assert set(interop.__all__) == FACE
    assert len(interop.__all__) == len(FACE)
    assert [
        name for name in dir(interop) if not name.startswith("_") and inspect.ismodule(getattr(interop, name))
    ] == []
    assert {name for name in dir(interop) if not name.startswith("_")} == FACE


@pytest.mark.parametrize("name", sorted(FACE))
def test_every_public_name_has_a_docstring(name: str) -> None:
    doc = inspect.getdoc(getattr(interop, name))
    assert doc
    assert doc.splitlines()[0].endswith((".", ",", ":")) or len(doc.splitlines()) > 1


@pytest.mark.parametrize("name", sorted(n for n in FACE if n.endswith("Error")))
def test_errors_are_public_and_built_in(name: str) -> None:
    """What a traceback shows can be imported, and `except ValueError` and its kin catch what they should."""
    kind = getattr(interop, name)
    assert kind.__module__ == "interop"
    assert issubclass(kind, interop.InteropError)
    built_in = {
        "OptionError": TypeError,
        "LeafError": TypeError,
        "PrecisionError": TypeError,
        "ContainerError": TypeError,
        "NarrowingError": OverflowError,
        "DeviceError": ValueError,
        "OutputMismatchError": ValueError,
        "UnsupportedError": NotImplementedError,
    }
    assert issubclass(kind, built_in.get(name, Exception if name == "InteropError" else RuntimeError))


def test_errors_pickle() -> None:
    """A worker's error arrives in its parent as it was."""
    import pickle

    error = interop.LeafError("what", got="f32[2]", expected="f32[3]", hint="Do this")
    error.function, error.argument = "f", "x[0]"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is interop.LeafError
    assert (
        str(again) == str(error) == "f: argument x[0]: what: got f32[2], expected f32[3]. Do this [errors.md#leaferror]"
    )


def test_the_version_is_there() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", interop.__version__)
    assert (PACKAGE / "py.typed").exists()


# --- arrows -----------------------------------------------------------------------------------------------------------

# A file imports only what stands above it, or beside it under the same name.
ORDER = [
    "_errors",
    "_notes",
    "_types",
    "_overloads",
    "_log",
    "_private",
    "_threads",
    "_streams",
    "_leaf",
    "_twice",
    "_side",
    "_signature",
    "_closed_over | _containers",
    "_symbolic",
    "_marshal",
    "_registered",
    "_located",
    "_derive",
    "_shapes",
    "_abstract",
    "_in_torch | _in_jax",
    "_module_in_jax | _models",
    "_compiled",
    "_given",
    "_call",
    "_crossing",
    "_module_in_torch",
    "_convert",
    "_decorators",
    "_explain",
    "__init__",
    "__main__",
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split(" | ")}


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _unit(file: Path) -> str:
    """The file, or the package that it is a part of, as it stands in the order."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it: a late import is an arrow too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "interop":
            parts = node.module.split(".")
            yield from [".".join(parts[1:])] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {file}"
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "interop")


@pytest.mark.parametrize("file", _files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    unit = _unit(file)
    assert unit in RANK, f"{unit} has no place in the order"
    for imported in _imports(file):
        other = imported.split(".")[0]
        assert RANK[other] < RANK[unit] or other == unit, f"{unit} imports {other}"


def test_no_cycle_inside_a_package() -> None:
    """Where an engine is several files, they too import one way."""
    arrows: dict[str, set[str]] = {}
    for file in _files():
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) > 1 and parts[-1] != "__init__":
            arrows[".".join(parts)] = {i for i in _imports(file) if i.startswith(f"{parts[0]}.")}
    while arrows:
        free = [name for name, needs in arrows.items() if not needs & arrows.keys()]
        assert free, f"a cycle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


PRIVATE = ("jax._src", "jaxlib", "torch._")


def _dotted(file: Path) -> Iterator[str]:
    """Every dotted name of a file, in code and imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "file", [f for f in _files() if _unit(f) != "_private"], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_private_interfaces_have_one_home(file: Path) -> None:
    """`_private/`, one file for each framework."""
    assert [name for name in _dotted(file) if name.startswith(PRIVATE)] == []


def test_a_pointer_is_never_asked_of_an_unfinished_array() -> None:
    """It waits with the interpreter locked, for a thread that needs the interpreter."""
    for file in _files():
        assert "unsafe_buffer_pointer" not in file.read_text()


# --- import -----------------------------------------------------------------------------------------------------------

IMPORT_PROGRAM = """
import sys, os, warnings, logging
warnings.simplefilter("error")
import jax, torch
before = {{
    "jax": dict(jax.config.values),
    "grad": torch.is_grad_enabled(),
    "dtype": torch.get_default_dtype(),
    "threads": torch.get_num_threads(),
    "filters": list(warnings.filters),
    "handlers": list(logging.getLogger().handlers),
    "environment": dict(os.environ),
    "generator": torch.get_rng_state().tolist(),
    "hook": sys.excepthook,
    "deterministic": torch.get_deterministic_debug_mode(),
}}
modules = set(sys.modules)
{imports}
after = {{
    "jax": dict(jax.config.values),
    "grad": torch.is_grad_enabled(),
    "dtype": torch.get_default_dtype(),
    "threads": torch.get_num_threads(),
    "filters": list(warnings.filters),
    "handlers": list(logging.getLogger().handlers),
    "environment": dict(os.environ),
    "generator": torch.get_rng_state().tolist(),
    "hook": sys.excepthook,
    "deterministic": torch.get_deterministic_debug_mode(),
}}
assert before == after, {{k: (before[k], after[k]) for k in before if before[k] != after[k]}}
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
assert not torch.cuda.is_initialized()
new = {{name.split(".")[0] for name in set(sys.modules) - modules}}
optional = {{"transformers", "equinox", "flax", "tensordict", "optax", "haiku", "torchvision", "chex", "scipy", "sklearn"}}
assert not new & optional, new & optional
heavy = {{"torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor"}}
assert not heavy & (set(sys.modules) - modules), heavy & set(sys.modules)
print("ok")
"""


def test_importing_has_no_side_effect(run_python: Callable[..., str]) -> None:
    """No backend is started, no flag is changed, no optional library and no compiler is imported."""
    assert run_python(IMPORT_PROGRAM.format(imports="import interop")) == "ok\n"


@pytest.mark.parametrize(
    "effect",
    ["import jax.numpy; jax.numpy.ones(1)", "torch.set_grad_enabled(False)", "import optax", "import torch._dynamo"],
)
def test_the_probe_is_not_blind(run_python: Callable[..., str], effect: str) -> None:
    """It sees what it is there to see."""
    with pytest.raises(AssertionError):
        run_python(IMPORT_PROGRAM.format(imports=effect))


def test_importing_again_does_not_register_twice(run_python: Callable[..., str]) -> None:
    run_python(
        """
        import sys, interop
        for name in [n for n in sys.modules if n.split(".")[0] == "interop"]:
            del sys.modules[name]
        import interop as again
        import torch, jax.numpy as jnp
        assert again is not interop
        for library in (interop, again):
            f = library.jittable(library.differentiable(library.as_torch(jnp.sin)))
            x = torch.zeros(1, requires_grad=True)
            torch.compile(f, fullgraph=True, backend="aot_eager")(x).backward()
            assert x.grad.item() == 1
        """
    )
