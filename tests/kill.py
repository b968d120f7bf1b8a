"""Kill training at random, fill its disk and damage its files, and count what is lost.

``make test-kill`` runs this. It prints a line for each kind of trouble, with the number of tries
and of failures, and exits with 1 if anything failed. It takes a few minutes and is not part of
``make test``.

A failure is: a result that differs from that of a run nobody disturbed, a checkpoint that was there
before and no longer loads, damage that is not noticed, a traceback, or a file of the user that has
changed. For the full disk it mounts a small file system in a mount namespace of its own, which
needs ``unshare``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked, which threads do not survive

import torch
from disturbed import (
    EPOCHS,
    SECONDS,
    Report,
    Work,
    forked,
    in_child,
    loads,
    one_line,
    waited,
)

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints


def kills(work: Work, count: int, number: int, title: str) -> bool:
    """Send a signal to a training again and again, until all have been sent; resume after each."""
    report, runs = Report(title), 0
    while report.tries < count:
        run, runs = work.directory / f"killed-{number}-{runs}", runs + 1
        complete = False
        while not complete:
            before = checkpoints(run)
            child = forked(work.command(run), work.directory / "output.txt")
            # Long enough to come some epochs further, short enough to hit the start as well.
            if report.tries < count:
                code = waited(child, work.random.uniform(0, 0.6 * work.seconds), number)
            else:
                code = waited(child, SECONDS)
            text = (work.directory / "output.txt").read_text(errors="replace")
            complete = code == 0
            report.tries += not complete
            expected = -number if number == signal.SIGKILL else 130
            # A signal that comes before the training listens ends the process at once.
            report.check(code in (0, expected, -number), f"exit code {code}: {text[-300:]}")
            kept = set(checkpoints(run))
            report.check(not before or bool(kept), "no checkpoint is left")
            report.check(all(map(loads, kept)), "a checkpoint does not load")
            report.check("Traceback" not in text, text[-300:])
            if len(report.failures) > 20:
                return report.show()
        report.check(work.equals_reference(run), "the results differ from an undisturbed run")
        left = [path.name for path in run.rglob(".writing-*")] + [*run.glob("run.lock")]
        report.check(not left, f"left behind: {left}")
        shutil.rmtree(run)
    return report.show(f"{runs} run{'' if runs == 1 else 's'} carried to the end and compared")


def killed_predictions(work: Work, count: int) -> bool:
    """Kill `predict --output`: the file before, or the complete new one, is there at any time."""
    report = Report("predict --output, kill -9")
    output = work.directory / "predicted.txt"
    command = ["predict", str(work.reference), "--input", str(work.sources), "--threads", "1"]
    command += ["--output", str(output)]
    started = time.monotonic()
    code, text = in_child(command)
    seconds, complete = time.monotonic() - started, output.read_bytes() if not code else b""
    report.check(code == 0, text[-300:])
    for _ in range(count):
        report.tries += 1
        old = b"the file before\n"
        output.write_bytes(old)
        child = forked(command, work.directory / "output.txt")
        waited(child, work.random.uniform(0, seconds * 1.1), signal.SIGKILL)
        report.check(output.read_bytes() in (old, complete), "the output is neither old nor new")
    for path in work.directory.glob(".writing-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return report.show()


def two_at_once(work: Work, count: int) -> bool:
    """Start the same run in two processes: one is refused, and the other is not disturbed."""
    report = Report("two processes on one run")
    for number in range(count):
        report.tries += 1
        run = work.directory / f"twice-{number}"
        outputs = [work.directory / f"output-{i}.txt" for i in range(2)]
        children = []
        for output in outputs:
            children.append(forked(work.command(run), output))
            time.sleep(work.random.uniform(0, 0.2))
        codes = [waited(child, SECONDS) for child in children]
        texts = [output.read_text(errors="replace") for output in outputs]
        report.check(sorted(codes) == [0, 2], f"exit codes {codes}: {texts}")
        if sorted(codes) == [0, 2]:
            refused = codes.index(2)
            named = f"in use by process {children[1 - refused]} on"
            report.check(named in texts[refused], texts[refused])
            report.check(work.equals_reference(run), "the other run was disturbed")
        shutil.rmtree(run, ignore_errors=True)
    return report.show()


# --- a full disk


def full_disk(work: Work, count: int) -> bool:
    """Train and predict on a disk that fills up; then go on with enough room."""
    report = Report("full disk")
    disk = work.directory / "disk"
    disk.mkdir(exist_ok=True)
    own = [sys.executable, __file__, "--in-namespace", str(work.directory), str(count)]
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run(["unshare", "--mount", *user, *own], capture_output=True, text=True)
    except FileNotFoundError:
        return report.show("not tried: there is no unshare")
    if done.returncode == 77:
        return report.show(f"not tried: {done.stdout.strip()}")
    if done.returncode:
        report.check(False, done.stderr[-500:])
        return report.show()
    found = json.loads(done.stdout.splitlines()[-1])
    report.tries, report.failures = found["tries"], found["failures"]
    return report.show(f"{found['full']} of them ran out of room")


def on_small_disks(directory: Path, count: int) -> int:
    """The part of `full_disk` in a mount namespace; prints its counts as JSON."""
    work = Work.__new__(Work)
    work.directory, work.random = directory, random.Random(count)
    work.lines, work.sources = directory / "lines.tsv", directory / "sources.txt"
    work.reference = directory / "reference"
    report, disk, full = Report("full disk"), directory / "disk", 0
    size = sum(path.stat().st_size for path in work.reference.rglob("*") if path.is_file())
    for number in range(count):
        report.tries += 1
        room = int(work.random.uniform(0.05, 1.2) * size)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            print(mounted.stderr.strip())
            return 77
        try:
            full += on_a_small_disk(work, disk, number, report)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    print(json.dumps({"tries": report.tries, "failures": report.failures, "full": full}))
    return 0


def on_a_small_disk(work: Work, disk: Path, number: int, report: Report) -> bool:
    """One try; returns whether the disk was full."""
    run = disk / "run"
    code, text = in_child(work.command(run))
    report.check(code == 0 or one_line(code, text), f"exit code {code}: {text[-300:]}")
    report.check(code == 0 or str(disk) in text, f"the message names no file: {text[-300:]}")
    if code:
        report.check(all(map(loads, checkpoints(run))), "a checkpoint does not load")
        left = [str(path) for path in disk.rglob(".writing-*")]
        report.check(not left, f"left behind: {left}")
    saved = work.directory / f"rescued-{number}"
    if run.exists():
        shutil.copytree(run, saved)
    code_then, text = in_child(work.command(saved))
    report.check(code_then == 0, f"it does not go on: {text[-300:]}")
    report.check(code_then == 0 and work.equals_reference(saved), "the results differ")
    # Predict into what is left of the disk: the old file stays if the new one has no room.
    output = disk / "predicted.txt"
    with contextlib.suppress(OSError):
        output.write_bytes(b"old\n")
        command = ["predict", str(work.reference), "--input", str(work.sources), "--output"]
        predicted, text = in_child([*command, str(output)])
        if predicted:
            report.check(one_line(predicted, text) and str(output) in text, text[-300:])
            report.check(output.read_bytes() in (b"old\n", b""), "the old output has changed")
        left = [str(path) for path in disk.rglob(".writing-*")]
        report.check(not left, f"left behind: {left}")
    shutil.rmtree(saved, ignore_errors=True)
    return code != 0


# --- damaged files


def copies(work: Work, report: Report, count: int) -> Iterator[Path]:
    """Yield a copy of the undisturbed run for each try."""
    run = work.directory / "copy"
    for _ in range(count):
        report.tries += 1
        shutil.copytree(work.reference, run)
        yield run
        shutil.rmtree(run)


def damages(work: Work, count: int) -> bool:
    """Truncate, change and mix the files of checkpoints; each must be noticed by every command."""
    report = Report("truncated, changed and mixed files")
    for run in copies(work, report, count):
        last, other = checkpoints(run)[-1], checkpoints(run)[0]
        name = work.random.choice((files.METADATA, files.MODEL, files.TRAINING))
        what = damage(work.random, last / name, other / name)
        report.check(not loads(last), f"{name}, {what}: not noticed")
        longer = [*work.command(run), "--epochs", str(EPOCHS + 1)]
        code, text = in_child(longer)
        report.check(one_line(code, text) and str(last) in text, f"{name}, {what}: {text[-300:]}")
        # Whoever removes the damaged one goes on from the one before.
        shutil.rmtree(last)
        code, text = in_child(work.command(run))
        report.check(code == 0 and work.equals_reference(run), f"{name}, {what}: {text[-300:]}")
    return report.show()


def damage(draw: random.Random, path: Path, other: Path) -> str:
    """Damage a file; return how."""
    data = bytearray(path.read_bytes())
    how = draw.choice(("truncated", "a bit flipped", "of another checkpoint", "emptied", "zeros"))
    if how == "truncated":
        del data[draw.randrange(len(data)) :]
    elif how == "a bit flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "of another checkpoint":
        data = bytearray(other.read_bytes())
    elif how == "emptied":
        data.clear()
    else:
        start = draw.randrange(len(data))
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
        data += b"\0"
    path.write_bytes(data)
    return how


def damaged_logs(work: Work, count: int) -> bool:
    """Damage the logs: the run goes on, and what was in the file is kept."""
    report = Report("damaged logs")
    for run in copies(work, report, count):
        shutil.rmtree(checkpoints(run)[-1])
        path = run / work.random.choice(("steps.csv", "epochs.csv"))
        what = damage(work.random, path, run / "epochs.csv")
        code, text = in_child(work.command(run))
        report.check(code == 0, f"{path.name}, {what}: exit code {code}: {text[-300:]}")
        own = files.load_tensors(checkpoints(run)[-1], files.MODEL)
        expected = files.load_tensors(checkpoints(work.reference)[-1], files.MODEL)
        report.check(all(torch.equal(own[n], expected[n]) for n in own), "another model")
    return report.show()


@contextlib.contextmanager
def place(given: str | None) -> Iterator[Path]:
    """The directory to work in: a new one, which is removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="kill-", dir=given))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_all(options: argparse.Namespace) -> int:
    """Run everything and return the exit code."""
    started = time.monotonic()
    with place(options.directory) as directory:
        work = Work(directory, options.seed)

        def share(divisor: int) -> int:
            return max(1, options.kills // divisor)

        parts: tuple[Callable[[], bool], ...] = (
            lambda: kills(work, share(1), signal.SIGKILL, "train, kill -9 and resume"),
            lambda: kills(work, share(5), signal.SIGTERM, "train, SIGTERM and resume"),
            lambda: killed_predictions(work, share(4)),
            lambda: two_at_once(work, share(20)),
            lambda: full_disk(work, share(8)),
            lambda: damages(work, share(4)),
            lambda: damaged_logs(work, share(6)),
        )
        whole = all([part() for part in parts])
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return 0 if whole else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many kill -9 (default: 100)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of all draws")
    parser.add_argument("--directory", help="where to work (default: the system's)")
    parser.add_argument("--in-namespace", nargs=2, metavar=("DIR", "N"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_namespace:
        sys.exit(on_small_disks(Path(given.in_namespace[0]), int(given.in_namespace[1])))
    sys.exit(run_all(given))
