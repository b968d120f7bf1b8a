"""Checkpoints are complete or absent, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import write_atomically

MODEL = {"weight": torch.arange(6.0).view(2, 3)}
TRAINING = {"generator": torch.arange(9, dtype=torch.uint8)}


def save(directory: Path, **meta: object) -> None:
    files.save(directory, meta, MODEL, TRAINING)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "new" / "one", step=3, loss=0.1)
    meta = files.load_metadata(tmp_path / "new" / "one")
    digests = meta.pop(files.DIGESTS)
    assert meta == {"format_version": files.FORMAT_VERSION, "step": 3, "loss": 0.1}
    assert digests.keys() == {files.MODEL, files.TRAINING, files.METADATA}
    for name, tensors in ((files.MODEL, MODEL), (files.TRAINING, TRAINING)):
        loaded = files.load_tensors(tmp_path / "new" / "one", name)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


@pytest.mark.parametrize("call", [1, 2, 3, 4])  # three files and the directory
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save(tmp_path / "one", step=1)
    calls = 0
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "two", step=2)
    assert os.listdir(tmp_path) == ["one"]
    assert files.load_metadata(tmp_path / "one")["step"] == 1
    assert torch.equal(files.load_tensors(tmp_path / "one", "model.safetensors")["weight"],
                       MODEL["weight"])  # fmt: skip


KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys, torch
from fused_attn.seq2seq.checkpoints import files
tensors, calls, sync = {"weight": torch.zeros(1000)}, 0, os.fsync
def fsync(descriptor):
    global calls
    calls += 1
    if calls == 5 + int(sys.argv[2]):  # five calls in a save
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = fsync
for name in ("one", "two"):
    files.save(pathlib.Path(sys.argv[1]) / name, {}, tensors, tensors)
"""


@pytest.mark.parametrize("call", [2, 4])
def test_a_kill_leaves_what_was_there(tmp_path: Path, call: int) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), str(call)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"one"}
    assert files.load_metadata(tmp_path / "one")
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["one"]


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            files.load_metadata(path)
            files.load_tensors(path, files.MODEL)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none", "no checkpoint at .*none: there is no such directory")
    fails(tmp_path, "checkpoint.json is missing")
    (tmp_path / "file").touch()
    fails(tmp_path / "file", "Not a directory")

    one = tmp_path / "one"
    save(one)
    whole = (one / files.MODEL).read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole + b"x", b"\xff" * 40):
        (one / files.MODEL).write_bytes(damaged)
        fails(one, "is damaged: ")
    (one / files.MODEL).unlink()
    fails(one, "model.safetensors is missing")
    for text in ("{", "[]", "{}", '"text"'):
        (one / files.METADATA).write_text(text)
        fails(one, "is damaged: ")
    (one / files.METADATA).write_text(json.dumps({"format_version": 99}))
    fails(one, "has format version 99; this version of fused-attn reads format version 2")


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log"
    write_atomically(file, b"old")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["log"] and file.read_bytes() == b"old"
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_kill_during_a_removal_leaves_no_broken_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "one")

    def killed(path: Path) -> None:
        (path / files.METADATA).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", killed)
        files.remove(tmp_path / "one")
    assert not (tmp_path / "one").exists()
    files.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == []
