"""What `kill.py` needs: a run that nobody disturbed, commands in children, and counts."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

# The commands are imported here, so that a forked child begins at once: a signal then hits the work
# and not the imports.
import fused_attn.seq2seq.commands.predict
import fused_attn.seq2seq.commands.train  # noqa: F401
from fused_attn.cli import main
from fused_attn.seq2seq import InputError
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints

EPOCHS = 12
OPTIONS = (
    *("--hidden", "16", "--embedding", "8", "--batch-size", "8", "--epochs", str(EPOCHS)),
    *("--lr", "5e-3", "--threads", "1", "--device", "cpu"),
)
SECONDS = 60  # after which a command counts as hanging


class Report:
    """Counts tries and failures of one kind of trouble, and prints them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.tries = 0
        self.failures: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Note a failure unless ``holds``."""
        if not holds:
            self.failures.append(f"try {self.tries}: {what}")

    def show(self, details: str = "") -> bool:
        """Print the counts, and return whether there were no failures."""
        count = len(self.failures)
        line = f"{self.title:<44} {self.tries:>4} tries  {count:>3} failures  {details}"
        print(line.rstrip(), flush=True)
        for failure in self.failures[:5]:
            print(f"    {failure}", flush=True)
        return not self.failures


class Work:
    """The data, the directory to work in, and a run that nobody disturbed."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.lines = directory / "lines.tsv"
        self.sources = directory / "sources.txt"
        words = [
            "".join(self.random.choices("abcd", k=self.random.randint(1, 6))) for _ in range(240)
        ]
        self.lines.write_text("".join(f"{word}\t{word[::-1]}\n" for word in words))
        self.sources.write_text("".join(f"{word}\n" for word in words * 20))
        self.reference = directory / "reference"
        started = time.monotonic()
        code, text = in_child(self.command(self.reference))
        self.seconds = time.monotonic() - started
        if code:
            raise SystemExit(f"the undisturbed run failed with {code}: {text}")

    def command(self, run: Path) -> list[str]:
        """Start or resume a run: a user does so after each trouble."""
        data = ["--train", str(self.lines), "--tokens", "chars"]
        start = ["train", "pairs", *data, "--output", str(run), *OPTIONS]
        return [*start, "--resume"] if checkpoints(run) else start

    def equals_reference(self, run: Path) -> bool:
        """Whether a complete run has the logs and the last model of the undisturbed one (bits)."""
        if (run / "steps.csv").read_bytes() != (self.reference / "steps.csv").read_bytes():
            return False
        last, expected = checkpoints(run)[-1], checkpoints(self.reference)[-1]
        own, other = (files.load_tensors(path, files.MODEL) for path in (last, expected))
        return last.name == expected.name and all(torch.equal(own[n], other[n]) for n in other)


def forked(command: list[str], output: Path) -> int:
    """Start a command in a forked child and return its number; its texts go to ``output``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    with contextlib.suppress(BaseException):
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        try:
            code = main(command)
        except BaseException:
            sys.excepthook(*sys.exc_info())
    os._exit(code)


def in_child(command: list[str]) -> tuple[int, str]:
    """Run a command in a child; return its code (negative for a signal) and what it printed."""
    with tempfile.NamedTemporaryFile() as output:
        child = forked(command, Path(output.name))
        code = waited(child, SECONDS)
        text = Path(output.name).read_text(errors="replace")
    return code, text


def waited(child: int, seconds: float, number: int = signal.SIGKILL) -> int:
    """Wait for a child, send it a signal when the time is up, and return its code."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, number)
    if number != signal.SIGKILL:
        return waited(child, SECONDS)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def loads(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    try:
        files.load_metadata(checkpoint)
        for name in (files.MODEL, files.TRAINING):
            files.load_tensors(checkpoint, name)
    except InputError:
        return False
    return True


def one_line(code: int, text: str) -> bool:
    """Whether a command has refused with one line of its own and no traceback."""
    errors = [line for line in text.splitlines() if "error:" in line]
    return code == 2 and len(errors) == 1 and "Traceback" not in text
