"""A command that does not get the memory that it needs ends with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.cli import main
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.training.trainer import Trainer


def too_large(*_: object, **__: object) -> Any:
    return torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space has


def on_a_gpu(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nOf 80 GiB ...")


def in_python(*_: object, **__: object) -> Any:
    raise MemoryError


def other(*_: object, **__: object) -> Any:
    raise RuntimeError("an error in the program")


@pytest.mark.parametrize("fails", [too_large, on_a_gpu, in_python])
def test_not_enough_memory(
    fails: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    train = ["train", "reverse", "--output", str(run), "--pairs", "50", "--hidden", "8"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", fails)
        assert main([*train, "--max-steps", "1"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert "not enough memory" in error and "--batch-size" in error
    assert main([*train, "--resume", "--batch-size", "16"]) == 0
    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "encode", fails)
        assert main(["predict", str(run), "1 2", "--beam", "9"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert "not enough memory" in error and "--beam" in error


def test_other_errors_are_not_about_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_step", other)
    with pytest.raises(RuntimeError, match="in the program"):
        main(["train", "reverse", "--output", str(tmp_path / "run"), "--pairs", "50"])
