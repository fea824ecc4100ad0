"""How contestants are timed against each other, and how the outcome is printed."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

Contestant = Callable[[], object]

ROUNDS = 25
BLOCK = 0.004  # seconds that a block of calls takes, about
MAX_CALLS = 1000

HEADER = f"{'cell':<46} {'ours':>10} {'against':<22} {'its':>10} {'result':>9} {'of minima':>9}  target"


@dataclass(frozen=True)
class Row:
    """One comparison of one cell, ready to print."""

    cell: str
    ours: str
    against: str
    theirs: str
    result: str
    of_minima: str
    target: str
    met: bool

    def __str__(self) -> str:
        verdict = self.target if self.met else f"{self.target}  MISSED"
        return (
            f"{self.cell:<46} {self.ours:>10} {self.against:<22} {self.theirs:>10} "
            f"{self.result:>9} {self.of_minima:>9}  {verdict}"
        )


@dataclass(frozen=True)
class Times:
    """Seconds per call of one contestant, one entry a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """What it usually takes."""
        return statistics.median(self.rounds)

    @property
    def minimum(self) -> float:
        """What it takes when nothing is in the way."""
        return min(self.rounds)


def race(contestants: dict[str, Contestant], rounds: int = ROUNDS) -> dict[str, Times]:
    """Time them by turns: each round in a new order, each block after one call that is not timed."""
    calls = {name: _calls_per_block(contestant) for name, contestant in contestants.items()}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            taken[name].append(_block(contestants[name], calls[name]))
    return {name: Times(times) for name, times in taken.items()}


def _calls_per_block(contestant: Contestant) -> int:
    """How many calls fill a block, after a few that compile and warm up."""
    for _ in range(5):
        contestant()
    start = time.perf_counter()
    contestant()
    return max(1, min(MAX_CALLS, round(BLOCK / (time.perf_counter() - start))))


def _block(contestant: Contestant, calls: int) -> float:
    gc.disable()
    try:
        contestant()
        start = time.perf_counter()
        for _ in range(calls):
            contestant()
        return (time.perf_counter() - start) / calls
    finally:
        gc.enable()


def ratios(cell: str, contestants: dict[str, Contestant], targets: dict[str, float], per: int = 1) -> list[Row]:
    """Race `ours` against the others; one row for each target, a highest ratio to a contestant of that name."""
    times = race(contestants)
    ours = times["ours"]
    return [
        _ratio_row(cell, ours, against, times[against], limit, per)
        for against, limit in targets.items()
    ]  # fmt: skip


def _ratio_row(cell: str, ours: Times, against: str, theirs: Times, limit: float, per: int) -> Row:
    ratio = ours.median / theirs.median
    minima = ours.minimum / theirs.minimum
    return Row(
        cell,
        microseconds(ours.median / per),
        against,
        microseconds(theirs.median / per),
        f"{ratio:.2f}x",
        f"{minima:.2f}x",
        f"<= {limit:g}x" if math.isfinite(limit) else "",
        ratio <= limit,
    )


def extra(cell: str, ours: str, against: str, limit: float, rounds: int = 7) -> list[Row]:
    """What one program takes more than another, both run in fresh interpreters, where each prints seconds."""
    times = {program: Times([]) for program in (ours, against)}
    for _ in range(rounds):
        for program in random.sample([ours, against], 2):
            times[program].rounds.append(_seconds(program))
    more = times[ours].median - times[against].median
    minima = times[ours].minimum - times[against].minimum
    return [
        Row(
            cell,
            milliseconds(times[ours].median),
            "the same without us",
            milliseconds(times[against].median),
            f"{1e3 * more:+.0f} ms",
            f"{1e3 * minima:+.0f} ms",
            f"<= +{1e3 * limit:g} ms",
            more <= limit,
        )
    ]


def _seconds(program: str) -> float:
    """What the program prints last. Its bytecode is there, as of what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def unmeasured(cell: str, error: Exception) -> Row:
    """A cell that raises, with the last words of what it said."""
    said = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    return Row(cell, "-", type(error).__name__, "-", "-", "-", said, met=False)


def count(cell: str, what: str, got: int, expected: int) -> Row:
    """A number that has to be exact."""
    return Row(cell, str(got), what, str(expected), "", "", f"= {expected}", got == expected)


class _Mallinfo(ctypes.Structure):
    """What `mallinfo2` of the C library returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


def allocated() -> int:
    """Bytes that this process has allocated and not freed, by either framework: both ask the C library for memory."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def kept(cell: str, ours: int, against: str, theirs: int, limit: float) -> Row:
    """Bytes that ours holds against bytes that theirs does."""
    ratio = ours / theirs
    return Row(cell, megabytes(ours), against, megabytes(theirs), f"{ratio:.2f}x", "", f"<= {limit:g}x", ratio <= limit)


def microseconds(seconds: float) -> str:
    """A time that is short."""
    return f"{1e6 * seconds:.1f} us"


def milliseconds(seconds: float) -> str:
    """A time that is not."""
    return f"{1e3 * seconds:.0f} ms"


def megabytes(size: float) -> str:
    """A size in memory."""
    return f"{size / 1e6:.1f} MB"


def grown(cell: str, what: str, calls: int, limit: float, call: Callable[[int], object]) -> Row:
    """Bytes that are left of so many calls, after some that warm up."""
    for i in range(min(calls, 200)):
        call(i)
    before = allocated()
    for i in range(calls):
        call(i)
    more = allocated() - before
    return Row(cell, f"{more / 1e6:+.1f} MB", what, "", "", "", f"<= {megabytes(limit)}", more <= limit)
