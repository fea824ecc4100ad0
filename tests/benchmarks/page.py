"""What was measured as a page of the documentation: one table, three pictures."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib as mpl
import torch
from cells import SIZES, sized
from harness import Row

mpl.use("agg")

from matplotlib import pyplot as plt  # noqa: E402 - after the choice of what draws

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PAGE, PICTURES = EXAMPLES / "speed.md", EXAMPLES / "speed"
BEGIN, END = "<!-- measured: written by make speed -->\n", "<!-- end of what was measured -->"
FRAMEWORKS = ("pure torch", "pure JAX")


def write(rows: Sequence[Row]) -> None:
    """The page and its pictures, anew."""
    PICTURES.mkdir(exist_ok=True)
    compared = [row for row in rows if row.ours.endswith("us") and row.target]
    draw_bars("floor.png", [row for row in compared if not row.against.startswith(FRAMEWORKS)])
    draw_bars("frameworks.png", [row for row in compared if row.against.startswith(FRAMEWORKS)])
    draw_sizes([row for row in rows if row.cell.startswith(sized(""))])
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + BEGIN + table([row for row in rows if not row.cell.startswith(sized(""))]) + END + after)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and what they were measured with."""
    lines = [
        f"| {row.cell} | {row.ours} | {row.against} | {row.theirs} | {row.result} | {row.target}{'' if row.met else ', missed'} |"
        for row in rows
    ]
    head = ["| what | ours | against | its | result | target |", "|---|---|---|---|---|---|"]
    return "\n".join([f"Measured with {versions()}, one thread.", "", *head, *lines, ""])


def versions() -> str:
    """What was measured with."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, jax {jax.__version__}, on {platform.machine()}"
    )


def draw_bars(name: str, rows: Sequence[Row]) -> None:
    """A bar for each ratio, a mark for its target."""
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row.cell} / {row.against}" for row in rows]  # both: two rows may be of one cell
    axes.barh(labels, [number(row.result) for row in rows], color=["#3b6ea5" if row.met else "#c0622f" for row in rows])
    axes.plot([number(row.target) for row in rows], labels, "k|", markersize=11, label="target")
    axes.axvline(1, color="0.6", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as long")
    axes.legend(loc="lower right")
    figure.savefig(PICTURES / name, dpi=90)
    plt.close(figure)


def draw_sizes(rows: Sequence[Row]) -> None:
    """Forward and backward of three dense layers, from one example to many."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    found = {(int(row.cell.split()[-1]), row.against): row for row in rows}
    axes.loglog(
        SIZES, [number(found[size, "pure torch"].ours) for size in SIZES], "o-", label="a JAX function in torch"
    )
    for against in FRAMEWORKS:
        axes.loglog(SIZES, [number(found[size, against].theirs) for size in SIZES], "o--", label=against)
    axes.set_xlabel("examples in the batch")
    axes.set_ylabel("forward + backward, microseconds")
    axes.legend()
    figure.savefig(PICTURES / "sizes.png", dpi=90)
    plt.close(figure)


def number(text: str) -> float:
    """The number in `1.05x`, `<= 1.2x` or `12.3 us`."""
    return float(re.search(r"\d+(\.\d+)?", text)[0])  # type: ignore[index] - there is one
