"""What a reader is shown has run: the README, its table of what works, the pages beside the examples, the quickstart."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen, nnx

import browse
import interop
import site_hooks
from interop import WrappedJaxFunction, as_jax, as_torch, differentiable, jittable, make_functional
from programs import ROOT, run_program
from test_transforms import GAPS
from test_transforms import __file__ as TRANSFORMS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples").glob("*.md"))]


def blocks(language: str) -> list[Any]:
    """The blocks of every page that are marked so: the page, the block, the line before it."""
    found = [
        (page, block)
        for page in PAGES
        for block in re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    rows = [(page, block.group(1), page.read_text()[: block.start(1)].count("\n")) for page, block in found]
    return [pytest.param(*row, id=f"{row[0].stem}-line{row[2]}") for row in rows]


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "block", "line"), blocks("python"))
def test_every_block_runs_alone_and_prints_what_it_says(
    page: Path, block: str, line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile("\n" * line + block, page, "exec"), {"__name__": page.stem})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)


@pytest.mark.parametrize(("page", "block", "line"), blocks("py"))
def test_a_block_of_another_library_is_python(page: Path, block: str, line: int) -> None:
    """It is marked so because it can't run here: what could run is marked to be run."""
    ast.parse(block)
    assert not re.search(r"^(from|import) interop\b", block, re.MULTILINE)


def test_the_readme_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?= {2,}#|`)", README.read_text())) <= targets


def test_the_readme_names_files_that_exist() -> None:
    named = re.findall(r"`((?:interop|tests|examples)/[\w/.]+)`", README.read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


# --- the table of models ----------------------------------------------------------------------------------------------


def of_linen() -> dict[str, Any]:
    model = linen.Sequential([linen.Dense(4), linen.BatchNorm(use_running_average=True), linen.Dense(1)])
    return {"model": model, "variables": model.init(jax.random.key(0), jnp.ones((2, 3)))}


def of_haiku() -> dict[str, Any]:
    """What haiku's `transform` returns, of a model that needs its key when it trains."""
    return {"model": SimpleNamespace(apply=lambda w, key, x: mask(key, x) @ w), "params": jnp.ones((3, 1))}


def mask(key: Any, x: Any) -> Any:
    return x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)


class Dropped(equinox.Module):
    """A layer that takes a key."""

    w: jax.Array
    dropout: equinox.nn.Dropout

    def __call__(self, x: Any, *, key: Any) -> Any:
        return self.dropout(x, key=key) @ self.w


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "flax.linen": of_linen,
    "flax.nnx": lambda: {
        "model": nnx.Sequential(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    },
    "equinox": lambda: {"model": Dropped(jnp.ones((3, 1)), equinox.nn.Dropout(0.5))},
    "haiku": of_haiku,
    "any function": lambda: {"function": lambda w, x: x @ w["w"], "params": {"w": jnp.ones((3, 1))}},
}
ROWS = dict(re.findall(r"^\| ([\w. ]+) \| `(WrappedJaxFunction\(.*?)`:? ?.* \|$", README.read_text(), re.MULTILINE))


def test_the_table_of_models_is_whole() -> None:
    assert set(ROWS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_line_of_the_table_of_models_trains(name: str) -> None:
    """And has a mode in which it gives one value twice."""
    module = eval(ROWS[name], {"WrappedJaxFunction": WrappedJaxFunction} | MODELS[name]())
    x = torch.rand(2, 3)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert list(module.parameters())
    module.eval()
    assert torch.equal(module(x), module(x))


# --- the table of what works ------------------------------------------------------------------------------------------

# (what torch calls it, what JAX calls it, the transform in `test_transforms`), over every function of the table
SUPPORT = [
    ("call", "call", "call"),
    ("`torch.compile(fullgraph=True)`", "`jax.jit`", "compile"),
    ("`backward`", "`jax.grad`", "gradient"),
    ("`torch.func.grad`", "`jax.vjp`", "functional_gradient"),
    ("`backward` of a compiled function", "`jax.jit` of `jax.grad`", "compiled_gradient"),
    ("double backward", "`jax.grad` of `jax.grad`", "second"),
    ("`torch.func.jvp`", "`jax.jvp`", "jvp"),
    ("`torch.func.jacrev`", "`jax.jacrev`", "jacrev"),
    ("`torch.func.jacfwd`", "`jax.jacfwd`", "jacfwd"),
    ("`torch.func.hessian`", "`jax.hessian`", "hessian"),
    ("`torch.func.vmap`", "`jax.vmap`", "vmap"),
    ("`vmap` of `grad`", "`vmap` of `grad`", "vmap_of_gradient"),
    ("gradient of `vmap`", "`grad` of `vmap`", "gradient_of_vmap"),
    ("`torch.utils.checkpoint`", "`jax.checkpoint`", "checkpoint"),
    ("triple backward", "`jax.lax.scan`", "third | scan"),
    ("`is_grads_batched`", "`jax.lax.cond`", "batch_of_cotangents | cond"),
    ("`torch.autograd.forward_ad`", "", "dual"),
    ("`torch.func.linearize`", "", "linearize"),
    ("`torch.func.functionalize`", "", "functionalize"),
    ("`gradcheck`, in every mode", "", "gradcheck"),
    ("reentrant `checkpoint`", "", "reentrant_checkpoint"),
    ("`save_on_cpu`, saved-tensor hooks", "", "saved_on_cpu"),
    ("`inference_mode`", "", "inference"),
    ("`autocast` (JAX's dtypes stand)", "", "autocast"),
    ("`torch.compile(dynamic=True)`", "", "compile_dynamic"),
    ("its `backward`", "", "compiled_gradient_dynamic"),
    ("`make_fx`, real and symbolic", "", "graph"),
    ("`make_fx` of a gradient", "", "graph_of_gradient"),
]

# (what it is called, the test of it), over functions of its own
SHOWN = [
    ("a whole training step in one graph; the backends eager, aot_eager and inductor", "test_compile.py::test_a_caller_is_one_graph_forward_and_backward"),
    ("open sizes without a new graph for each", "test_compile.py::test_a_size_that_changes_is_no_new_graph"),
    ("`torch.export`, strict and not, run in another process", "test_compile.py::test_an_exported_program_runs_in_another_process"),
    ("`torch.fx.symbolic_trace`", "test_compile.py::test_written_down_by_symbolic_trace"),
    ("AOTInductor", "test_compile.py::test_compiled_ahead_of_time"),
    ("compiled autograd", "test_compile.py::test_a_backward_that_is_compiled_as_it_runs"),
    ("fake and meta tensors", "test_compile.py::test_a_meta_tensor"),
    ("`torch.library.opcheck`", "test_compile.py::test_the_operation_keeps_the_rules_of_torch"),
    ("every pair of `grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`, `vmap`", "test_in_torch.py::test_every_transform_of_every_transform"),
    ("64-bit tensors while JAX keeps 32, complex gradients", "test_dtypes.py::test_a_complex_derivative_is_torchs_at_every_order"),
    ("prints and callbacks, once a call whatever derivative is asked", "test_in_torch.py::test_a_derivative_is_that_of_the_value"),
    ("functions that can't be traced: `as_torch(jit=False)`", "test_in_torch.py::test_a_function_that_looks_at_values"),
    ("JAX keys as arguments, seeds as tensors", "test_in_torch.py::test_a_typed_key_as_an_argument"),
    ("`DataLoader` with spawned workers", "test_engines.py::test_workers_that_load_data"),
    ("threads", "test_engines.py::test_threads_at_once_give_what_one_gives"),
    ("DDP", "test_engines.py::test_ddp"),
    ("FSDP2", "test_engines.py::test_fsdp"),
    ("Lightning Fabric", "test_engines.py::test_fabric"),
    ("models of flax, equinox and haiku as modules: named parameters, state dicts, buffers, keys, `stack_module_state`, FSDP2", "test_module_in_torch.py::test_a_parameter_is_named_by_its_path"),
    ("programs written for torch-jax-interop, with their import changed", "test_seed.py::test_a_flax_model_in_torch"),
]  # fmt: skip
SHOWN_IN_JAX = [
    ("`value_and_grad`, jitted pull-backs, third order, `linearize`, `while_loop`, `fori_loop`, `switch`, `map`, `associative_scan`, `custom_vjp`, `custom_jvp`, `eval_shape`, `make_jaxpr`, ahead-of-time compilation", "test_in_jax.py::test_a_transform"),
    ("`vmap` over any axes, nested", "test_in_jax.py::test_any_axes"),
    ("every policy of `jax.checkpoint`", "test_in_jax.py::test_a_policy_changes_no_gradient"),
    ("`jax.linear_transpose`, and the solvers that need it", "test_in_jax.py::test_the_transpose_of_a_linear_function"),
    ("Taylor mode (`jax.experimental.jet`), `checkify`", "test_in_jax.py::test_taylor_mode"),
    ("donation", "test_in_jax.py::test_a_donated_argument_is_given_away_and_no_other_changes"),
    ("`jax.debug_nans`", "test_in_jax.py::test_a_nan_made_in_torch_is_reported"),
    ("gradients that never run the Python forward again", "test_in_jax.py::test_a_gradient_does_not_enter_the_forward_again"),
    ("functions that branch on values and check them; with `example_output` `.item()`, `.numpy()` and old-style autograd functions too", "test_in_jax.py::test_a_function_that_can_not_be_captured"),
    ("`jax.shard_map` and `pmap`, as pure JAX has them", "test_devices.py::test_shard_map"),
    ("two processes of `jax.distributed`", "test_devices.py::test_two_processes"),
    ("one key, one mask: eagerly, compiled, in loops, in batches, in the backward", "test_state.py::test_one_key_is_one_draw_however_it_is_asked"),
    ("random functions without a key, as effects of the program", "test_state.py::test_control_flow_draws_anew_each_time_or_names_the_way_out"),
    ("modules that update their buffers", "test_state.py::test_training_is_torchs_own_step_by_step"),
    ("modules as functions of their parameters: tied, frozen, parametrized, hooked, compiled; trained by optax", "test_module.py::test_modules_of_all_kinds"),
    ("ResNet, LSTM, transformers, a Gaussian process, GPT-2, LLaMA, BERT, T5, ViT", "test_models.py::test_model"),
    ("torch's database of operators (see [operators](examples/operators.md))", "test_operators.py::test_an_operator_is_what_torch_says"),
    ("functions that write to their arguments, or return views", "test_callbacks.py::test_a_function_that_writes_or_returns_views_is_pure_in_jax"),
    ("exceptions that arrive as themselves, or, from a compiled program, in words", "test_callbacks.py::test_an_exception_in_the_users_own_program_is_in_the_message"),
]  # fmt: skip


def support_table() -> str:
    """The rows, with what the matrix of tests knows of each."""
    rows = [
        f"| {of_torch} | {works('torch', keys[0])} | {of_jax} | {works('jax', keys[-1]) if of_jax else ''} |"
        for of_torch, of_jax, key in SUPPORT
        for keys in [key.split(" | ")]
    ]
    head = ["| a JAX function in torch | | a torch function in JAX | |", "|---|---|---|---|"]
    shown = ["", "And, of a JAX function in torch:", "", *(f"- {what}" for what, _ in SHOWN)]
    shown += ["", "And, of a torch function in JAX:", "", *(f"- {what}" for what, _ in SHOWN_IN_JAX)]
    return "\n".join([*head, *rows, *shown, ""])


def works(host: str, transform: str) -> str:
    """What the gaps of the matrix leave."""
    missing = [case for of_host, of_transform, case in GAPS if (of_host, of_transform) == (host, transform)]
    if "*" in missing:
        return "not yet"
    return f"yes, but for {', '.join(sorted(missing))}" if missing else "yes"


def with_table(text: str, name: str, table: str) -> str:
    """A page with the table between its two marks."""
    begin, end = f"<!-- {name}: written by tests/test_docs.py -->\n", f"<!-- end of the {name} -->"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def test_the_support_table_is_what_the_matrix_says() -> None:
    """`python tests/test_docs.py` writes it."""
    assert README.read_text() == with_table(README.read_text(), "support table", support_table())


@pytest.mark.parametrize("transform", [key for *_, keys in SUPPORT for key in keys.split(" | ")])
def test_every_row_of_the_support_table_is_a_test(transform: str) -> None:
    text = Path(TRANSFORMS).read_text()
    assert f'"{transform}"' in text or f"def test_{transform}(" in text


@pytest.mark.parametrize("test", [test for _, test in SHOWN + SHOWN_IN_JAX])
def test_every_line_below_the_support_table_is_a_test(test: str) -> None:
    """One that is not known to fail."""
    file, name = test.split("::")
    before, found, _ = (Path(__file__).parent / file).read_text().partition(f"def {name}(")
    assert found
    assert "xfail" not in before.rpartition("\n\n\n")[2]


# What torch refuses of every function, or of every operation that is not its own: ours, torch's, and what it says.
TWICE = "torch.compile with aot_autograd does not currently support double backward"
BY_TORCH = {
    "double backward through a compiled function": (
        lambda f, x: torch.autograd.grad(torch.autograd.grad(compiled(f)(x).sum(), x, create_graph=True)[0].sum(), x),
        TWICE,
    ),
}


@pytest.mark.parametrize(("ask", "said"), BY_TORCH.values(), ids=BY_TORCH)
def test_what_torch_itself_refuses(ask, said: str) -> None:
    """In the same words for a function of torch and for one of JAX; the README says so."""
    for fn in (torch.sin, jittable(differentiable(as_torch(jnp.sin)))):
        with pytest.raises(RuntimeError, match=said):
            ask(fn, torch.ones(3, requires_grad=True))
    assert said in README.read_text()


def compiled(fn):
    """The function in one graph."""
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


# --- the table of limits ----------------------------------------------------------------------------------------------


def asked_fullgraph() -> Any:
    return compiled(as_torch(jnp.sin))(torch.ones(3))


def asked_export() -> Any:
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    return jax.export.export(jax.jit(jittable(as_jax(torch.sin))))(x)


def asked_export_of_a_lambda() -> Any:
    class Doubled(torch.nn.Module):
        double = staticmethod(jittable(as_torch(lambda x: 2 * x)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.double(x)

    return torch.export.export(Doubled(), (torch.ones(3),))


def asked_buffers() -> Any:
    apply, params = make_functional(torch.nn.BatchNorm1d(2))
    return apply(params, jnp.ones((3, 2)))


# (the host, what is asked, the question): each raises, and the table has what it says
LIMITS: list[tuple[str, str, Callable[[], Any]]] = [
    ("torch", "a gradient without `differentiable`", lambda: as_torch(jnp.sin)(torch.ones(3, requires_grad=True))),
    ("torch", "`torch.compile(fullgraph=True)` without `jittable`", asked_fullgraph),
    ("torch", "a double backward through a compiled function", lambda: BY_TORCH["double backward through a compiled function"][0](jittable(differentiable(as_torch(jnp.sin))), torch.ones(3, requires_grad=True))),
    ("torch", "`torch.export` of a lambda", asked_export_of_a_lambda),
    ("torch", "an integer that 32 bits don't hold", lambda: as_torch(jnp.negative)(torch.tensor(2**40))),
    ("torch", "a sparse tensor", lambda: as_torch(jnp.sin)(torch.eye(2).to_sparse())),
    ("torch", "a meta tensor, outside of a trace", lambda: as_torch(jnp.sin)(torch.ones(2, device="meta"))),
    ("JAX", "a gradient without `differentiable`", lambda: jax.grad(as_jax(torch.sum))(jnp.ones(3))),
    ("JAX", "`jax.jit` without `jittable`", lambda: jax.jit(as_jax(torch.sin))(jnp.ones(3))),
    ("JAX", "`jax.export`", asked_export),
    ("JAX", "shapes that depend on values", lambda: jax.jit(jittable(as_jax(torch.nonzero)))(jnp.ones(3))),
    ("JAX", "a 64-bit float of torch, while JAX keeps 32", lambda: as_jax(torch.Tensor.double)(jnp.ones(3))),
    ("JAX", "random numbers in `jax.checkpoint`, without `rng`", lambda: jax.grad(jax.checkpoint(lambda x: jittable(differentiable(as_jax(torch.dropout)))(x, 0.5, train=True).sum()))(jnp.ones(3))),
    ("JAX", "a module that writes to its buffers", asked_buffers),
    ("JAX", "a module that is not initialised", lambda: make_functional(torch.nn.LazyLinear(2))),
]  # fmt: skip
PAGE_OF_LIMITS = ROOT / "examples" / "support.md"


def limits_table() -> str:
    """The rows, with what each question was answered."""
    rows = [f"| {host} | {what} | {refusal(ask)} |" for host, what, ask in LIMITS]
    return "\n".join(["| called from | asked | what is said |", "|---|---|---|", *rows, ""])


def refusal(ask: Callable[[], Any]) -> str:
    """The type of the exception, and the line of it that is ours, or the first; it is a defect if there is none."""
    try:
        ask()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if "Stack @" in line), lines[0])
        return f"`{type(error).__name__}`: {said}".replace("|", "\\|")
    raise AssertionError("that was answered")


@pytest.mark.skipif(jax.version.__version_info__ >= (0, 11), reason="JAX says some of it in other words there")
def test_the_table_of_limits_is_what_is_said() -> None:
    """`python tests/test_docs.py` writes it."""
    assert PAGE_OF_LIMITS.read_text() == with_table(PAGE_OF_LIMITS.read_text(), "limits", limits_table())


# --- the page of errors -----------------------------------------------------------------------------------------------

SECTIONS = site_hooks.sections((ROOT / "examples" / "errors.md").read_text())
ELSEWHERE = {"NestedError": "test_engines.py", "ForkError": "test_hazards.py"}  # what no block can show, and its tests
KINDS = {name: kind for name, kind in vars(interop).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_every_error_has_its_section() -> None:
    assert set(SECTIONS) == set(KINDS)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ELSEWHERE])
def test_a_section_makes_the_mistake_that_it_is_about(name: str) -> None:
    """Whether its block runs, and what it prints, is tested with those of all pages."""
    program = ast.parse(re.search(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)[1])
    attempt = next(node for node in program.body if isinstance(node, ast.Try))
    assert [handler.type.id for handler in attempt.handlers] == [name]
    exec(compile(ast.Module(program.body[: program.body.index(attempt)], []), name, "exec"), scope := {})
    with pytest.raises(KINDS[name]) as raised:
        exec(compile(ast.Module(attempt.body, []), name, "exec"), scope)
    assert name == "InteropError" or f"[errors.md#{name.lower()}]" in str(raised.value)
    builtin = re.search(r"Also an? `(\w+)`", SECTIONS[name])
    assert builtin is None or isinstance(raised.value, getattr(builtins, builtin[1]))


@pytest.mark.parametrize(("name", "tests"), ELSEWHERE.items())
def test_what_a_section_tells_is_tested_elsewhere(name: str, tests: str) -> None:
    assert name in (Path(__file__).parent / tests).read_text()


# --- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_and_a_browser_finds_nothing_wrong(tmp_path: Path) -> None:
    """Strictly: no link to nothing, no page that is nowhere. Where there is a browser, it looks at them all."""
    run_program("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path, timeout=240)
    assert (tmp_path / "index.html").is_file()
    if browse.CHROMIUM and site_hooks.MERMAID.exists():
        assert browse.browse(tmp_path) == []


def test_a_page_that_points_at_nothing_is_found(tmp_path: Path) -> None:
    """What looks for broken links finds those that there are."""
    (tmp_path / "a.html").write_text('<a href="b.html#there"></a> <a href="b.html#not"></a> <img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="there"></p> <a href="https://example.org"></a>')
    pages = {name: (browse.Page((tmp_path / name).read_text()), []) for name in ("a.html", "b.html")}
    found = [wrong for name in pages for wrong in browse.broken(tmp_path, "http://127.0.0.1/", name, pages)]
    assert found == [
        "a.html: b.html#not has no such anchor",
        "a.html: c.png is not there",
        "b.html: https://example.org is on another server",
    ]


def test_a_section_of_the_readme_is_on_a_page_once() -> None:
    text = site_hooks.on_page_markdown("<!-- README: Install -->\nafter")
    assert "pip install" in text
    assert text.endswith("\nafter")
    with pytest.raises(LookupError, match="no section called 'Nothing'"):
        site_hooks.on_page_markdown("<!-- README: Nothing -->")


# --- programs ---------------------------------------------------------------------------------------------------------


def test_the_quickstart_learns() -> None:
    """It fails by itself if it does not recognise 95 % of the digits, or if a derivative is off."""
    printed = run_program("examples/quickstart.py", timeout=240)
    accuracies = re.findall(r"held-out accuracy (\d+\.\d)%", printed)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 95
    assert len(re.findall(r"gradients? within \d\.\de[-+]\d\d", printed)) == 3
    assert len(re.findall(r"Hessian-vector product within \d\.\de-\d\d", printed)) == 1
    assert len(re.findall(r"step \d+\.\d\d ms against \d+\.\d\d ms", printed)) == 2


def test_the_benchmarks_run() -> None:
    """One cell that asserts nothing about time."""
    assert "every target is met" in run_program("tests/benchmarks/bench.py", "retraces", timeout=120)


def test_the_page_of_what_was_measured_has_every_cell() -> None:
    cells = re.findall(r'^@cell\("(.+)"\)', (ROOT / "tests" / "benchmarks" / "cells.py").read_text(), re.MULTILINE)
    page = (ROOT / "examples" / "speed.md").read_text()
    assert len(cells) > 20
    assert [name for name in cells if f"\n| {name}" not in page] == []


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), "support table", support_table()))
    PAGE_OF_LIMITS.write_text(with_table(PAGE_OF_LIMITS.read_text(), "limits", limits_table()))
