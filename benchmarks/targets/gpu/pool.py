"""Worker processes that receive one item at a time; an item that kills its worker is a line too.

A worker writes the line of an item itself and then answers on a pipe. If it dies or hangs, only
that item is lost: the pool writes a line for it and starts another worker for the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.targets.gpu import jsonl

MOST_FAILED_STARTS = 3  # in a row; then the stage ends


@dataclass(frozen=True)
class Phase:
    """Items that run in the same way: ``jobs`` at a time, each for at most ``limit_s`` seconds."""

    name: str
    jobs: int
    limit_s: float
    start_s: float = 90.0  # seconds until a worker must be ready
    share: float = 1.0  # of the time that the stage has left, at most
    in_blocks: bool = False  # neighbours share a worker, and what it has compiled


@dataclass
class Job:
    """What a pool runs, and where its lines are written."""

    stage: str
    phase: Phase
    items: Sequence[str]
    target: Path  # the stage's file
    end: float  # of time.monotonic
    arguments: Sequence[str] = ()  # of every worker
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A process that answers each item with a line, together with its children."""

    def __init__(self, job: Job) -> None:
        self.log = tempfile.TemporaryFile()
        answers, theirs = os.pipe()
        command = [sys.executable, "-m", "benchmarks.targets.gpu.worker", job.stage, job.phase.name]
        command += [*job.arguments, "--lines", str(job.target), "--answers", str(theirs)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            env=os.environ | job.environment,
            process_group=0,  # not a session of its own: what ends this process ends it too
        )
        os.close(theirs)
        self.answers = answers
        self._pending = b""

    def ask(self, item: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(item) + "\n").encode())
        self.process.stdin.flush()

    def answer(self, end: float) -> str | None:
        """The next answer; "" from a worker that has died, None after ``end``."""
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                return None
            data = os.read(self.answers, 4096)
            if not data:
                return ""
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def close(self, grace: float = 0.0) -> int:
        """End it and its children. Returns the exit code, negative the signal if it was killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self.answers)
        return self.process.wait()

    def tail(self, size: int = 600) -> str:
        """The end of what it printed."""
        end = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, end - size))
        return self.log.read().decode(errors="replace").strip()


class Pool:
    """Hands the items of a job to its workers: in order, or to each worker from its own block."""

    def __init__(self, job: Job) -> None:
        self.job = job
        jobs = max(1, min(job.phase.jobs, len(job.items)))
        size = -(-len(job.items) // jobs) if job.items else 0
        blocks = [job.items[i * size : (i + 1) * size] for i in range(jobs)]
        self.jobs = jobs
        self.blocks = [deque(block) for block in (blocks if job.phase.in_blocks else [job.items])]
        self.lock = threading.Lock()
        self.failed_starts = 0
        self.workers: set[Worker] = set()
        self.stopped = False

    def run(self) -> None:
        """Run until all items have a line, time is up, or workers fail to start."""
        threads = [threading.Thread(target=self._serve, args=(i,)) for i in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """For a signal handler: start no new item, and kill all workers."""
        self.stopped = True
        for worker in tuple(self.workers):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)

    def _next(self, slot: int) -> str | None:
        with self.lock:
            mine = self.blocks[slot % len(self.blocks)]
            if mine:
                return mine.popleft()
            longest = max(self.blocks, key=len)
            return longest.pop() if longest else None

    def _over(self) -> bool:
        late = time.monotonic() >= self.job.end
        return late or self.stopped or self.failed_starts >= MOST_FAILED_STARTS

    def _line(self, item: str, outcome: str, worker: Worker, **rest: Any) -> None:
        line = {"phase": self.job.phase.name, "item": item, "outcome": outcome}
        jsonl.append(self.job.target, line | rest | {"log": worker.tail()})

    def _start(self) -> Worker | None:
        """A worker that is ready, or None if it did not start."""
        worker = Worker(self.job)
        self.workers.add(worker)
        limit = min(time.monotonic() + self.job.phase.start_s, self.job.end)
        answer = worker.answer(limit)
        if answer == "ready":
            self.failed_starts = 0
            return worker
        is_late = answer is None and limit == self.job.end
        code = self._end(worker, grace=5.0 if answer == "" else 0.0)
        if not is_late and not self.stopped:
            with self.lock:
                self.failed_starts += 1
            self._line("(start)", "crashed" if answer == "" else "hung", worker, code=code)
        worker.log.close()
        return None

    def _end(self, worker: Worker, grace: float) -> int:
        self.workers.discard(worker)
        return worker.close(grace)

    def _serve(self, slot: int) -> None:
        worker: Worker | None = None
        while not self._over():
            if worker is None:
                worker = self._start()
                continue
            item = self._next(slot)
            if item is None:
                break
            if not self._do(worker, item):
                worker.log.close()
                worker = None
        if worker is not None:
            self._end(worker, grace=0.0 if self._over() else 5.0)
            worker.log.close()

    def _do(self, worker: Worker, item: str) -> bool:
        """Let the worker do an item. Returns whether it can take another."""
        began = time.monotonic()
        limit = min(began + self.job.phase.limit_s, self.job.end)
        try:
            worker.ask(item)
            answer = worker.answer(limit)
        except BrokenPipeError:
            answer = ""
        if answer == "done":
            return True
        code = self._end(worker, grace=0.0 if answer is None else 5.0)
        # An item that the end of the stage has interrupted gets no line, so that it is run again.
        if answer == "lost" or self.stopped or (answer is None and limit == self.job.end):
            return False
        outcome = "hung" if answer is None else "crashed"
        self._line(item, outcome, worker, code=code, seconds=time.monotonic() - began)
        return False
