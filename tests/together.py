"""Threads, or processes, that start together."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

THREADS = 8


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
