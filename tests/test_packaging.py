"""What is built is what is installed: the wheel, the source distribution, the version."""

from __future__ import annotations

import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import interop
from programs import ROOT, run_program

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUN_TIME = {"torch", "jax", "jaxlib", "wrapt", "typing-extensions", "numpy"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    run_program("-m", "hatchling", "build", "--directory", folder, timeout=120)
    return folder


def test_the_wheel_holds_the_library_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"interop_torch_jax-{interop.__version__}.dist-info"
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "interop").rglob("*.py")} | {"interop/py.typed"}
    assert {name for name in names if not name.startswith(about)} == library
    assert f"{about}/licenses/LICENSE" in names


def test_the_source_distribution_holds_what_its_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    top = f"interop_torch_jax-{interop.__version__}/"
    names = {name.removeprefix(top) for name in tarfile.open(sdist).getnames()}  # noqa: SIM115 - read once
    wanted = [
        "tests/conftest.py",
        "tests/typing/overloads.py",
        "examples/quickstart.py",
        "examples/pictures/pinn_torch_net.png",
    ]
    wanted += ["README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml", "pyproject.toml"]
    assert [name for name in wanted if name not in names] == []


def test_the_wheel_works_from_where_it_is_unpacked(built: Path, tmp_path: Path) -> None:
    """In an interpreter of its own; `make smoke` does the same where nothing else is installed."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = ["-W", "error", "-W", "ignore::DeprecationWarning", ROOT / "tests" / "smoke.py"]  # torch.jit's own
    assert str(tmp_path) in run_program(*program, timeout=240, cwd=tmp_path, PYTHONPATH=str(tmp_path))


def test_the_version_is_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert f"\n## {interop.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_run_time_needs_six_packages() -> None:
    assert {line.partition(">")[0] for line in PROJECT["dependencies"]} == RUN_TIME


def test_a_file_is_set_up_in_one_process(request: pytest.FixtureRequest) -> None:
    """Where tests run in several: what a file sets up takes minutes, and would be set up in each."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@test_packaging")
