"""Training with several processes, gradient accumulation and other precisions."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fused_attn.cli import main
from fused_attn.seq2seq.config import CELLS, ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples, epoch_batches, split_batch
from fused_attn.seq2seq.devices import choose_device, own_device
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model import recurrent
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.training.processes import launch
from fused_attn.seq2seq.training.trainer import StepReport, Trainer

SIZE = 20


def make_examples(count: int = 130) -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    sources = [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in lengths]
    return Examples.of(sources, [s[::-1][: n % 4 + 2] for n, s in enumerate(sources)])


def losses(config: TrainingConfig, **shape: object) -> tuple[list[float], Seq2Seq]:
    torch.manual_seed(1)
    model = Seq2Seq(ModelConfig(hidden=16, embedding=8, dropout=0.0, **shape), SIZE, SIZE)
    trainer = Trainer(model, make_examples(), config)
    reports: list[StepReport] = []
    while not trainer.finished:
        assert trainer.run_epoch(reports.append, lambda: False)
        trainer.finish_epoch()
    return [report.loss for report in reports], model


@pytest.mark.parametrize("batches", [{"batch_size": 32}, {"batch_tokens": 300}])
def test_a_batch_in_parts_is_the_whole_batch(batches: dict[str, int]) -> None:
    """Loss and parameters agree, although the parts have different numbers of symbols."""
    options = {**batches, "epochs": 2, "lr": 0.01, "label_smoothing": 0.1}
    whole, expected = losses(TrainingConfig(**options))
    for parts in (3, 40):  # 40: more parts than pairs in a batch
        found, model = losses(TrainingConfig(**options, accumulate=parts))
        assert found == pytest.approx(whole, abs=2e-4)
        for name, parameter in model.state_dict().items():
            torch.testing.assert_close(parameter, expected.state_dict()[name], atol=2e-3, rtol=0)


def test_parts_hold_every_row_once() -> None:
    rows = torch.arange(11)
    for parts in (1, 3, 11, 13):
        split = split_batch(rows, parts)
        assert len(split) == parts and torch.cat(split).tolist() == rows.tolist()
        assert max(map(len, split)) - min(map(len, split)) <= 1


def test_batches_by_symbols_fill_the_budget() -> None:
    examples = make_examples(2000)
    config = TrainingConfig(batch_tokens=400)
    sizes = examples.source_lengths, examples.target_lengths
    counts = set()
    for epoch in range(2):
        batches = epoch_batches(examples, config, epoch)
        counts.add(len(batches))
        assert torch.cat(batches).sort().values.tolist() == list(range(2000))
        areas = [len(rows) * sum(int(size[rows].max()) for size in sizes) for rows in batches]
        assert max(areas) <= 400
        assert sum(areas) / len(areas) > 340
    assert len(counts) == 1  # else the number of steps of a run would not be known
    one = TrainingConfig(batch_tokens=3)  # less than any pair: each pair is a batch
    assert len(epoch_batches(examples, one, 0)) == 2000


def test_without_buckets_a_batch_has_any_lengths() -> None:
    examples = make_examples(1000)
    batches = epoch_batches(examples, TrainingConfig(batch_size=50, bucket=False), 0)
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert min(len(examples.source_lengths[rows].unique()) for rows in batches) > 3
    with pytest.raises(ValueError, match="bucket must be left on"):
        TrainingConfig(batch_tokens=100, bucket=False)


def test_bfloat16_learns_the_same() -> None:
    options = {"batch_size": 32, "epochs": 15, "lr": 0.01}
    single, _ = losses(TrainingConfig(**options))
    mixed, model = losses(TrainingConfig(**options, precision="bf16"))
    assert mixed != single
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert mixed[-1] < 0.7 * mixed[0]
    assert sum(mixed[-5:]) == pytest.approx(sum(single[-5:]), rel=0.1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_processor_without_a_bfloat16_lstm(
    cell: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would raise there; the recurrent layers run in float32, with the same results."""
    monkeypatch.setattr(recurrent, "has_bfloat16_lstm", lambda: False)
    torch.manual_seed(2)
    stack = recurrent.Stack(ModelConfig(cell=cell, dropout=0.0), 7, 5, 2)
    # Both states in bfloat16, as the output of a linear layer.
    state = tuple(torch.randn(2, 3, 5).bfloat16() for _ in range(2 if cell == "lstm" else 1))
    x: Any = torch.randn(3, 4, 7).bfloat16()
    whole: Any = x.float()
    if is_packed:
        x, whole = (pack_padded_sequence(t, [4, 2, 1], batch_first=True) for t in (x, whole))
    expected, last = stack(whole, tuple(tensor.float() for tensor in state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, final = stack(x, state)
    assert found.data.dtype == torch.float32
    assert torch.equal(found.data, expected.data)
    assert all(map(torch.equal, final, last))


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="precision 16 needs a GPU"):
        launch("cpu", "16")


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "mps", "", "cuda:x"):
        with pytest.raises(InputError, match=f"device must be auto, cpu, .* got '{name}'"):
            choose_device(name)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(InputError, match=f"device {missing} is not available"):
        choose_device(missing)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert choose_device(name) == torch.device("cuda")
    assert (
        choose_device("cuda:1") == choose_device(torch.device("cuda:1")) == torch.device("cuda:1")
    )
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [own_device(n) for n in ("auto", "cuda", "cpu", "cuda:0")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
        "cuda:0",
    ]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InputError, match="cuda:2 is not available: torch finds 2 CUDA devices"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="cuda:2 is not available: this build of torch does not"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    "command",
    [
        "predict g2p word",
        "evaluate g2p",
        "explain g2p word --output",
        "chat g2p",
        "train g2p --output",
    ],
)
def test_every_command_says_that_a_device_is_not_there(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    output = [str(tmp_path / "out")] if command.endswith("--output") else []
    assert main([*command.split(), *output, "--device", missing]) != 0
    assert f"--device {missing} is not available: " in capsys.readouterr().err


def test_a_batch_on_a_device_leaves_its_lengths_on_the_host() -> None:
    batch = make_examples().batch(torch.arange(3)).to(torch.device("meta"))
    assert batch.source.is_meta and batch.target.is_meta and batch.source_lengths.is_cpu


TRAIN = """
import sys
import torch.distributed as dist
from fused_attn.cli import main
code = main(sys.argv[1:])
# If the group is left to the exit of the interpreter, threads of gloo may abort the process.
assert not dist.is_initialized(), "the process group was left open"
sys.exit(code)
"""


def run(tmp_path: Path, name: str, processes: int, *options: str) -> Path:
    """Train on the task reverse, and return the directory of the run."""
    output = tmp_path / name
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    launcher = [sys.executable, str(script)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher = [sys.executable, *torchrun, str(script)]
    shape = "--numbers 12 --pairs 700 --longest 8 --hidden 32 --embedding 16 --epochs 2 --lr 0.01"
    shape += " --score general --dropout 0"
    argv = [*launcher, "train", "reverse", "--output", str(output), *shape.split(), *options]
    # One thread, because the processes share the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best checkpoint") == 1
    return output


def table(directory: Path, name: str) -> list[dict[str, str]]:
    with (directory / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """The same batches, half of each in a process, give the same loss and metrics."""
    taught = ["--bucket", "--teacher", str(run(tmp_path, "teacher", 1, "--max-steps", "4"))]
    alone = run(tmp_path, "alone", 1, *taught)
    together = run(tmp_path, "together", 2, *taught, "--on-disk", "--tensorboard")
    steps = [table(directory, "steps.csv") for directory in (alone, together)]
    assert len(steps[0]) == len(steps[1]) == 12
    expected, found = ([float(row["loss"]) for row in rows] for rows in steps)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < 0.9 * found[0]
    ends = [table(directory, "epochs.csv")[-1] for directory in (alone, together)]
    for name in ("sequences wrong", "numbers wrong"):
        first, second = (float(row[name]) for row in ends)
        assert second == pytest.approx(first, abs=0.02)
    assert any((together / "tensorboard").iterdir())
    # One process resumes the run of two, and does not change a finished run.
    done = run_again(together)
    assert "is complete: all 12 steps are done" in done


def run_again(directory: Path) -> str:
    command = [sys.executable, "-m", "fused_attn", "train", "reverse", "--output", str(directory)]
    return subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True).stdout


def predict(
    tmp_path: Path, name: str, processes: int, source: Path, *options: str
) -> tuple[int, str, Path]:
    """Predict for the lines of a file with the bundled model."""
    script = tmp_path / "predict.py"
    script.write_text(TRAIN)
    launcher = [sys.executable, str(script)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher = [sys.executable, *torchrun, str(script)]
    output = tmp_path / name
    argv = [*launcher, "predict", "g2p", "--input", str(source), "--output", str(output)]
    argv += options
    done = subprocess.run(
        argv,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert sorted(path.name for path in tmp_path.iterdir() if ".parts" in path.name) == []
    return done.returncode, done.stderr, output


def test_two_processes_predict_in_the_order_of_the_input(tmp_path: Path) -> None:
    words = [f"{first}{second}{i % 7 * 'a'}" for i in range(5) for first in LETTERS
             for second in LETTERS]  # fmt: skip
    source = tmp_path / "words.txt"
    source.write_text("".join(f"{word}\n" for word in words))
    assert len(words) > 3 * 1024 and len(words) % 1024  # several batches, the last one short
    code, error, alone = predict(tmp_path, "alone", 1, source)
    assert code == 0, error
    code, error, together = predict(tmp_path, "together", 2, source)
    assert code == 0, error
    assert len(alone.read_text().splitlines()) == len(words)
    assert together.read_text() == alone.read_text()
    # A bad line in the share of the second process: the output file is not changed.
    source.write_text("\n".join(words[:1500]) + "\nna1ve\n")
    code, error, _ = predict(tmp_path, "together", 2, source, "--strict")
    assert code != 0 and "line 1501: unknown symbol '1'" in error
    assert together.read_text() == alone.read_text()


LETTERS = "abcdefghijklmnopqrstuvwxyz"
REFUSED = {
    "output and alignments": (
        ["--output", "x", "--alignments", "y.svg"],
        "--output cannot be combined with --alignments",
    ),
    "text": (["hello", "--input", "x", "--output", "y"], "--input cannot be combined with TEXT"),
    "no file": (["--input", "nowhere", "--output", "y"], "cannot read nowhere: No such file"),
    "no directory": (["--input", "x", "--output", "no/y"], "--output: there is no directory no"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_cannot_be_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options, message = REFUSED[kind]
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "g2p", *options]) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
