"""A slice of torch's operators, of every kind, in every mode; `operators.py` runs the whole of the database."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import pytest
import torch

import operators
from operators import DTYPES, MODES, NEEDS_VALUES, NOT_COUNTED, PASSED, TOO_LARGE, TOO_WIDE, differences

EVERY = frozenset(MODES)
NO_FORWARD = EVERY - {"jvp"}  # torch has no forward derivative of it, but a backward of its backward
FIRST_ORDER = EVERY - {"jvp", "hvp"}
NO_DERIVATIVE = frozenset({"value", "jit", "vmap"})
NO_TENSORS = frozenset({"value", "jit"})

# dtype -> modes that torch has -> kind -> operators
SLICE = {
    "float32": {
        EVERY: {
            "pointwise": "add|div.no_rounding_mode|pow|clamp|where|masked_fill|nn.functional.gelu|special.xlog1py|floor",
            "reduction": "sum|prod|var|amax|logsumexp|std_mean|linalg.vector_norm|nanmean",
            "view": "view|transpose|expand|diagonal|unfold|as_strided|split|select|__getitem__",
            "in place": "add, in place|cumsum, in place|squeeze, in place|index_put, in place",
            "shape": "cat|stack|meshgrid.list_of_tensors|roll|tril|nn.functional.pad.reflect|nn.functional.pixel_shuffle",
            "linear algebra": "matmul|einsum|linalg.cholesky|linalg.eigh|linalg.svd|linalg.solve|linalg.slogdet|linalg.qr",
            "convolution": "nn.functional.conv2d|nn.functional.conv_transpose2d",
            "pooling": "nn.functional.max_pool2d|nn.functional.adaptive_avg_pool2d|nn.functional.max_unpool2d",
            "norm": "nn.functional.layer_norm|nn.functional.batch_norm|nn.functional.rms_norm|nn.functional.normalize",
            "index": "gather|scatter|scatter_reduce.amax|index_put|index_add|take_along_dim|as_strided_scatter",
            "order": "sort|topk|median|cummax",
            "loss": "nn.functional.cross_entropy|nn.functional.mse_loss|nn.functional.nll_loss|nn.functional.huber_loss|nn.functional.soft_margin_loss",
            "complex inside": "fft.rfft|fft.irfft2|stft|linalg.eig",
            "cumulative": "cumsum|cumprod|logcumsumexp",
            "network": "nn.functional.scaled_dot_product_attention|nn.functional.embedding|nn.functional.bilinear",
            "image": "nn.functional.interpolate.bilinear|nn.functional.interpolate.bicubic",
            "distance": "nn.functional.cosine_similarity",
            "dtype": "bfloat16|complex|polar",
        },
        NO_FORWARD: {
            "index": "index_reduce.prod",
            "image": "nn.functional.grid_sample",
        },
        FIRST_ORDER: {"distance": "cdist|nn.functional.pdist", "network": "nn.functional.embedding_bag"},
        NO_DERIVATIVE: {
            "integers": "argmax|argsort|searchsorted|bucketize|count_nonzero",
            "booleans": "isnan|logical_and|eq",
            "constant": "zeros_like",
        },
        NO_TENSORS: {"constant": "arange|full"},
    },
    "float64": {
        EVERY: {
            "64 bits": "mul|mean|linalg.svd|nn.functional.conv1d|softmax.with_dtype|double|sort|fft.fft",
            "in place": "mul, in place",
        },
        NO_DERIVATIVE: {"integers": "argmax|hash_tensor"},
    },
    "complex64": {
        EVERY: {
            "pointwise": "mul|exp|abs|angle|real|conj|sgn|masked_fill",
            "reduction": "sum|prod|linalg.vector_norm",
            "linear algebra": "matmul|linalg.cholesky|linalg.eigh|linalg.solve|linalg.det",
            "transform": "fft.fft2|fft.ifft|fft.irfft",
            "in place": "mul, in place|conj_physical, in place",
            "shape": "view_as_real|cumsum|index_select",
        },
        NO_DERIVATIVE: {"booleans": "isfinite|ne"},
    },
}

# What does not pass yet, and why. A gap that closes fails its test.
GAPS: dict[tuple[str, str, str], str] = {}


def rows() -> Iterator[Any]:
    """An operator with the modes in which it is asked and those that torch has; a gap is a row of its own."""
    for dtype, tables in SLICE.items():
        for modes, kinds in tables.items():
            for kind, names in kinds.items():
                for name in names.split("|"):
                    gaps = {mode: GAPS[name, dtype, mode] for mode in MODES if (name, dtype, mode) in GAPS}
                    yield pytest.param(name, dtype, EVERY - set(gaps), modes, id=f"{kind}-{name}-{dtype}")
                    for mode, cause in gaps.items():
                        gap = pytest.mark.xfail(strict=True, reason=cause)
                        yield pytest.param(name, dtype, {mode}, modes, id=f"{kind}-{name}-{dtype}-{mode}", marks=gap)


# (operator, dtype) -> the sentence of the contract, and the modes in which it is refused
REFUSED = {
    ("nonzero", "float32"): (NEEDS_VALUES, {"jit"}),
    ("unique", "float32"): (NEEDS_VALUES, {"jit"}),
    ("masked_select", "float32"): (NEEDS_VALUES, {"jit", "jit(grad)", "hvp"}),
    ("double", "float32"): (TOO_WIDE, EVERY),
    ("hash_tensor", "float32"): (TOO_LARGE, NO_DERIVATIVE),
}

database = functools.cache(operators.database)


@pytest.mark.parametrize(("name", "dtype", "asked", "modes"), list(rows()))
def test_an_operator_is_what_torch_says(name: str, dtype: str, asked: Set[str], modes: Set[str]) -> None:
    """In every mode that torch has; it has those of the table, and no other."""
    found = operators.compare(database()[name], dtype, 1, asked)
    assert found == {mode: PASSED if mode in modes else NOT_COUNTED for mode in asked}


@pytest.mark.parametrize(("name", "dtype"), REFUSED)
def test_what_the_contract_refuses_is_refused(name: str, dtype: str) -> None:
    """By name, in these modes and in no other."""
    sentence, modes = REFUSED[name, dtype]
    found = operators.compare(database()[name], dtype, 1)
    assert {mode for mode, outcome in found.items() if outcome == sentence} == modes
    assert {outcome for mode, outcome in found.items() if mode not in modes} <= {PASSED, NOT_COUNTED}


# --- the comparison itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "words"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.1], 1e-2, "off by 0.1", id="a number"),
        pytest.param([1.0, 2.0], [1.0, 2.1], 1e-1, None, id="a number within the tolerance"),
        pytest.param([1.0, np.nan], [1.0, 2.0], 1e-2, "1 NaN, expected 0", id="a NaN"),
        pytest.param([1.0, np.nan], [1.0, np.nan], 1e-2, None, id="the same NaN"),
        pytest.param([[1.0]], [1.0], 1e-2, "float32[1, 1], expected float32[1]", id="a shape"),
        pytest.param([1], [1.0], 1e-2, "int32[1], expected float32[1]", id="a dtype"),
        pytest.param([1], [1], 0, None, id="an integer in 32 bits"),
    ],
)
def test_a_difference_is_seen(got: list, expected: list, tolerance: float, words: str | None) -> None:
    array = np.asarray(got)
    array = array.astype(np.int32 if array.dtype.kind == "i" else np.float32)
    found = differences([array], [torch.tensor(expected)], tolerance)
    assert found is None if words is None else words in found
    assert differences([array, array], [torch.tensor(expected)], tolerance) is not None


def test_an_operator_that_crashes_or_hangs_ends_its_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said before is kept."""
    monkeypatch.setattr(operators, "PATIENCE", 2)
    for end in ("os.abort()", "time.sleep(60)"):
        program = f"import os, time; print('begun', flush=True); {end}"
        assert list(operators.said_by(["-c", program])) == ["begun\n"]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_counts_and_explains() -> None:
    """Each pair in one number; what is refused and what was not asked in none."""
    modes = {"value": PASSED, "jit": NEEDS_VALUES, "grad": "ValueError: no | yes", "jvp": NOT_COUNTED}
    records = [
        {"name": "one", "dtype": "float32", "modes": modes},
        {"name": "two", "dtype": "float32", "modes": {"value": PASSED, "jit": PASSED}},
        {"name": "three", "dtype": "float32", "skipped": "it draws random numbers"},
    ]
    text = operators.page(records, 1)
    assert "| float32 | **all** | 4 | 3 | 1 | 75.00 % | 1 |" in text
    assert "| `one` | float32 | grad | `ValueError: no / yes` |" in text
    assert "- it draws random numbers (1): `three` (float32)" in text
    assert f"- {NEEDS_VALUES.removeprefix('refused: ')} (1): `one` (float32, jit)" in text


def test_the_page_that_was_written_says_that_99_of_100_pass() -> None:
    rows = re.findall(r"^\| (\w+) \| \*\*all\*\* \| (\d+) \| (\d+) \|", operators.PAGE.read_text(), re.MULTILINE)
    assert {dtype for dtype, _, _ in rows} == set(DTYPES)
    for dtype, counted, passed in rows:
        assert int(passed) >= 0.99 * int(counted), dtype
        assert int(counted) > 2000, dtype
