"""The price of a crossing, measured against what it can't be cheaper than: `make bench`, or `bench.py NAME ...`.

Every contestant of a cell runs in one process, by turns and in a random order each round, so that a busy moment of the
machine hits them all. One torch thread and one XLA thread: what is measured is the crossing, not the arithmetic.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by both frameworks when they are imported.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import cells  # noqa: E402 - after the environment
from harness import HEADER, Row, unmeasured  # noqa: E402
from tqdm import tqdm  # noqa: E402


def main(wanted: list[str]) -> int:
    """Run the cells whose name contains one of the words, or all of them; print the table, or write its page too."""
    writes = "--write" in wanted
    wanted = [word for word in wanted if word != "--write"]
    chosen = {name: cell for name, cell in cells.CELLS.items() if not wanted or any(word in name for word in wanted)}
    if not chosen:
        print(f"no cell is called {' or '.join(wanted)}; there are: {', '.join(cells.CELLS)}")
        return 2
    print(HEADER)
    measured: list[Row] = []
    for name, cell in tqdm(chosen.items(), leave=False, disable=None):
        for row in rows(name, cell):
            tqdm.write(str(row))
            measured.append(row)
    if writes:
        import page  # it draws: the measurements need none of that

        page.write(measured)
    missed = [row for row in measured if not row.met]
    print(f"{len(missed)} rows miss their target" if missed else "every target is met")
    return 0


def rows(name: str, cell: cells.Cell) -> list[Row]:
    """What the cell measures; one that can't run says why, and the others go on."""
    try:
        return cell()
    except Exception as error:
        return [unmeasured(name, error)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
