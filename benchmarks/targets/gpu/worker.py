"""A worker of the pool: reads items from its standard input and writes a line for each.

``python -m benchmarks.targets.gpu.worker STAGE --list`` prints the items of every phase instead.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from benchmarks.targets.gpu import jsonl
from benchmarks.targets.gpu.pool import Phase

_PR_SET_PDEATHSIG = 1


class Stage(Protocol):
    """A module ``benchmarks.targets.gpu.STAGE``."""

    PHASES: Sequence[Phase]

    def items(self, phase: str, options: argparse.Namespace) -> list[str]:
        """The items of a phase; the same in every process."""

    def run(self, phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
        """The fields of an item's line. An exception becomes a line too."""


def module_of(stage: str) -> Any:
    """The module of a stage; a name with a dot is a module's own name."""
    return import_module(stage if "." in stage else f"benchmarks.targets.gpu.{stage}")


class Channel:
    """Receives items, writes their lines and answers the pool."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = 0.0
        # A descriptor of its own: pytest replaces the standard input of what it runs.
        self.source = os.fdopen(os.dup(0), encoding="utf-8")

    def answer(self, word: str) -> None:
        os.write(self.options.answers, f"{word}\n".encode())

    def received(self) -> Iterator[str]:
        """The items, until the parent sends no more or has ended."""
        self.answer("ready")
        for line in self.source:
            self.began = time.monotonic()
            yield json.loads(line)

    def write(self, item: str, **fields: Any) -> None:
        line = {"phase": self.options.phase, "item": item}
        seconds = round(time.monotonic() - self.began, 3)
        jsonl.append(self.options.lines, line | {"seconds": seconds} | fields)

    def finish(self, item: str, lost: str | None, **fields: Any) -> None:
        """Write a line and answer. If the CUDA context is lost, the process ends."""
        if lost is None:
            self.write(item, **fields)
            self.answer("done")
            return
        self.write(item, **fields | {"outcome": "cuda_error", "cuda": lost})
        self.answer("lost")
        os._exit(3)  # the destructors of a lost context may hang


def lost_context(device: str) -> str | None:
    """CUDA's error, if an earlier call has broken the context; None otherwise."""
    torch = sys.modules.get("torch")
    if device != "cuda" or torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:
        return jsonl.short(error)
    return None


def serve(stage: Stage, channel: Channel) -> None:
    """Run items until there are no more."""
    options = channel.options
    gc.collect()
    gc.freeze()  # torch collects garbage before it captures a graph, over all objects
    for item in channel.received():
        fields: dict[str, Any] = {"outcome": "passed"}
        try:
            fields |= stage.run(options.phase, item, options)
            lost = lost_context(options.device)
        except Exception as error:
            lost = lost_context(options.device)
            fields = {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
        channel.finish(item, lost, **fields)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.targets.gpu.worker", description=__doc__
    )
    made.add_argument("stage")
    made.add_argument("phase", nargs="?", default="")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--lines", type=Path)
    made.add_argument("--answers", type=int)
    made.add_argument("--list", action="store_true")
    made.add_argument(
        "--tests", nargs="*", default=[], help="test files to run instead of the contract tests"
    )
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    stage = module_of(options.stage)
    if options.list:
        found = {phase.name: stage.items(phase.name, options) for phase in stage.PHASES}
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return 0
    die_with_parent()
    # A stage may have a loop of its own, as pytest does.
    getattr(stage, "serve", lambda channel: serve(stage, channel))(Channel(options))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
