"""One run, one owner: what a second process is told, and what a killed one leaves."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq import InputError, ModelConfig, TrainingConfig
from fused_attn.seq2seq.training.directory import LOCK, is_new, owned

TINY = ["--hidden", "8", "--embedding", "8", "--pairs", "300", "--longest", "5", "--threads", "1"]
PAIRS = [("a b", "b a"), ("b", "b"), ("a", "a"), ("b a", "a b")]


def train(run: Path, *options: str) -> list[str]:
    return ["train", "reverse", "--output", str(run), *TINY, *options]


def started(run: Path, *options: str, wait_for: str = "steps.csv") -> subprocess.Popen[bytes]:
    """A training in a process of its own that has come as far as a file in its directory."""
    command = [sys.executable, "-m", "fused_attn", *train(run, *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    for _ in range(1200):
        if (run / wait_for).exists():
            return process
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    raise AssertionError("it has not begun in a minute")


def test_a_second_process_is_told_who_owns_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = started(run, "--epochs", "100000", wait_for="epochs.csv")
    try:
        for options in ([], ["--resume"], ["--resume", "--on-disk"]):
            before = sorted(path for path in run.iterdir() if path.name != "checkpoints")
            assert main(train(run, *options)) == 2
            error = capfd.readouterr().err
            assert re.search(rf"{run} is in use by process {process.pid} on .*: wait", error)
            after = sorted(path for path in run.iterdir() if path.name != "checkpoints")
            assert before == after and process.poll() is None
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            seq2seq.fit(PAIRS, output=run, resume=True, progress=False)
        # Its checkpoints can be used meanwhile.
        assert main(["predict", str(run), "1 2"]) == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert not (run / LOCK).exists()
    assert main(train(run, "--resume", "--epochs", "1")) == 0


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, "--epochs", "100000")
    process.kill()
    process.wait()
    assert (run / LOCK).read_text().startswith(f"process {process.pid} on ")
    assert main(train(run, "--resume", "--epochs", "1")) == 0
    assert not (run / LOCK).exists()


def test_a_start_that_is_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, "--pairs", "3000000", wait_for=LOCK)
    process.kill()
    process.wait()
    assert not list(run.glob("checkpoints/step-*"))
    (run / "checkpoints" / ".writing-1x2y").mkdir(parents=True)
    (run / "checkpoints" / ".writing-1x2y" / "model.safetensors").write_bytes(b"half")
    (run / ".writing-ab12").write_bytes(b"half")
    (run / "pairs").mkdir()
    (run / "pairs" / "source.values").write_bytes(b"1234")
    assert is_new(run)
    assert main(train(run, "--epochs", "1")) == 0
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "epochs.csv", "steps.csv"]
    assert not list(run.rglob(".writing-*"))


@pytest.mark.parametrize(
    "mine", ["notes.txt", "pairs/mine.txt", "checkpoints/old/model", "pairs", "checkpoints"]
)
def test_files_of_the_user_are_not_left_overs(
    tmp_path: Path, mine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / mine).parent.mkdir(parents=True)
    (run / mine).write_text("mine")
    assert not is_new(run)
    assert main(train(run)) == 2
    assert "is not an empty directory" in capfd.readouterr().err
    assert (run / mine).read_text() == "mine" and not (run / LOCK).exists()


def test_threads_of_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found: list[str] = []

    def second() -> None:
        try:
            seq2seq.fit(PAIRS, output=run, progress=False)
        except InputError as error:
            found.append(str(error))

    with owned(run):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found and f"in use by process {os.getpid()} on" in found[0]
    assert not run.exists(), "a directory that was made for the lock alone is removed"


def test_a_failed_start_and_an_error_free_the_run(tmp_path: Path) -> None:
    shape, recipe = ModelConfig(hidden=8), TrainingConfig(epochs=1)
    options = {"model": shape, "progress": False}
    run = tmp_path / "run"
    with pytest.raises(InputError, match="guided"):
        training = TrainingConfig(epochs=1, guided=1.0)
        seq2seq.fit(PAIRS, output=run, training=training, **options)  # type: ignore[arg-type]
    assert not run.exists()
    seq2seq.fit(PAIRS, output=run, training=recipe, **options)  # type: ignore[arg-type]
    assert not (run / LOCK).exists()
    with pytest.raises(InputError, match="not an empty directory"):
        seq2seq.fit(PAIRS, output=run, training=recipe, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to resume"):
        seq2seq.fit(PAIRS, output=tmp_path / "none", resume=True, progress=False)
    assert not (tmp_path / "none").exists() and not (run / LOCK).exists()


def test_a_lock_file_that_the_owner_removes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened the file before the owner removed it must not own a file without a name."""
    run, flock = tmp_path / "run", fcntl.flock
    removed: list[Path] = []

    def after_the_owner_has_left(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(run / LOCK)
            removed[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_owner_has_left)
    with owned(run):
        assert removed and (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(InputError, match="in use"), owned(run):
            pass
    assert not run.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(tmp_path / "run"), owned(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(train(tmp_path / "file" / "run")) == 2
    assert main(train(tmp_path / "file")) == 2
    assert (tmp_path / "file").read_text() == "mine"
    run = tmp_path / "run"
    (run / LOCK).mkdir(parents=True)
    assert main(train(run)) == 2
    assert all(len(line) < 300 for line in capfd.readouterr().err.splitlines())
    shutil.rmtree(run)


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "directory"])
def test_a_lock_that_is_not_a_regular_file(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The number of the process is written into the lock: never into another file."""
    run, mine, lock = tmp_path / "run", tmp_path / "mine.txt", tmp_path / "run" / LOCK
    run.mkdir()
    mine.write_text("mine")
    if kind == "FIFO":
        os.mkfifo(lock)
    elif kind == "directory":
        lock.mkdir()
    else:
        lock.symlink_to(mine if kind == "link" else tmp_path / "none")
    assert main(train(run)) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"{lock} must be a regular file" in error and "remove it" in error
    assert mine.read_text() == "mine" and not (tmp_path / "none").exists()
    assert [path.name for path in run.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "one"), ("WORLD_SIZE", ""), ("LOCAL_WORLD_SIZE", "0")]
)
def test_an_environment_that_torchrun_does_not_make(
    tmp_path: Path,
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert main(train(tmp_path / "run")) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"the environment variable {name} must be a number" in error and repr(value) in error
    assert not (tmp_path / "run").exists()


def test_a_fork_that_ends_does_not_free_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fused_attn.seq2seq.training.directory import owned\n"
        f"with owned(Path({str(run)!r})):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        sys.exit(0)\n"
        "    os.waitpid(child, 0)\n"
        f"    print(os.path.exists({str(run / LOCK)!r}))\n"
        f"print(os.path.exists({str(run)!r}))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]
