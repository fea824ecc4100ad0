"""Threads, or processes, that start together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

THREADS = 8
TESTS = Path(__file__).parent
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """The results of as many threads, which start together."""
    barrier = threading.Barrier(THREADS)

    def start(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))


def processes_at_once(
    command: Sequence[str], environments: Sequence[dict[str, str]], logs: Sequence[Path], *, cwd: Path, timeout: float
) -> list[Any]:
    """The exit codes of processes that run one command, each in an environment and with a log of its own."""
    processes = []
    for environment, log in zip(environments, logs, strict=True):
        with log.open("w") as out:
            started = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        processes.append(started)
    codes: list[Any] = []
    for process in processes:
        try:
            codes.append(process.wait(timeout=timeout))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append("killed: it hung")
    return codes


# --- two processes of torch.distributed -------------------------------------------------------------------------------


def one_of_two(runs: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """One of the two: run everything in order, and print a line for each."""
    import torch.distributed as dist

    rank, meet = int(os.environ["RANK"]), "file://" + os.environ["MEET"]
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for name, run in runs.items():
        try:
            found = run()
        except Exception:
            found = {"raised": traceback.format_exc()}
        print("\n" + json.dumps([name, found]), flush=True)
    dist.destroy_process_group()


def two_ranks(program: str, place: Path) -> list[dict[str, Any]]:
    """What each of two processes found that run this program, by name; they work in that place."""
    common = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "MEET": str(place / "meet"), "WORLD_SIZE": "2"}
    logs = [place / f"{rank}" for rank in range(2)]
    environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    codes = processes_at_once([sys.executable, "-c", program], environments, logs, cwd=place, timeout=80)
    found = []
    for log, code in zip(logs, codes, strict=True):
        text = log.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('["')]
        found.append(dict(lines) | {"exit": code, "tail": text[-2000:]})
    return found


def each(ranks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What the processes found under this name."""
    for rank in ranks:
        assert name in rank, f"not reached, exit {rank['exit']}\n{rank['tail']}"
        assert "raised" not in rank[name], rank[name]["raised"]
    return [rank[name] for rank in ranks]
