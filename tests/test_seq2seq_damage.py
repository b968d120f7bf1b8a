"""Damaged and hostile checkpoints: one line that names what is wrong, at once, and no crash."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from torch import Tensor

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.export import save_model
from fused_attn.seq2seq.checkpoints.find import best_checkpoint, checkpoints
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import Predictor, load
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig, Translate, TranslateConfig
from fused_attn.seq2seq.vocabulary import Vocabulary

DATA = Path(__file__).resolve().parent / "data" / "before_rooms"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.make_checkpoint(tmp_path_factory.mktemp("whole") / "one")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def with_meta(directory: Path, **values: Any) -> None:
    """Change the metadata of a checkpoint, and give it right digests."""
    document = json.loads((directory / files.METADATA).read_bytes())
    (directory / files.METADATA).write_text(json.dumps({**document, **values}))
    damage.set_digests(directory)


def with_tensors(directory: Path, name: str, **values: Tensor | None) -> None:
    tensors = files.load_tensors(directory, name)
    changed = {key: value for key, value in {**tensors, **values}.items() if value is not None}
    files.save_tensors(directory / name, changed)
    damage.set_digests(directory)


@pytest.mark.timeout(1800)
def test_no_damage_is_more_than_an_error(tmp_path: Path) -> None:
    """A few mutations in ``make test``; with HYPOTHESIS_PROFILE=long many, new ones each time."""
    long = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    count, seed = (4000, int(time.time())) if long else (100, 1)
    script = Path(damage.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(count), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    bad = [part for part in done.stdout.split("\r") if "BAD" in part]
    assert done.returncode == 0, "\n".join(bad) + done.stdout[-300:] + done.stderr[-2000:]
    assert f"{count} mutations" in done.stdout


@pytest.mark.parametrize("name", [files.MODEL, files.TRAINING, files.METADATA])
def test_files_of_other_checkpoints_are_noticed(whole: Path, copy: Path, name: str) -> None:
    """A file of another checkpoint of the same run, and one that was changed or cut short."""
    other = copy.parent / "other"
    model = {key: tensor + 1 for key, tensor in files.load_tensors(whole, files.MODEL).items()}
    training = files.load_tensors(whole, files.TRAINING)
    training = {**training, "step.output.bias": training["step.output.bias"] + 1}
    files.save(other, {**files.load_metadata(whole), "longest_source": 3}, model, training)
    data = (copy / name).read_bytes()
    swapped = (other / name).read_bytes()
    assert swapped != data
    changed = bytearray(data)
    changed[-20] ^= 1
    for damaged in (swapped, bytes(changed), data[:-1], data + b" "):
        (copy / name).write_bytes(damaged)
        if damaged == data + b" " and name == files.METADATA:
            continue  # white space after a document is nothing
        with pytest.raises(InputError) as caught:
            files.load_metadata(copy)
            files.load_tensors(copy, files.MODEL)
            files.load_tensors(copy, files.TRAINING)
        # The metadata of another checkpoint is right by itself: then the other files are not.
        named = files.MODEL if name == files.METADATA and damaged == swapped else name
        assert str(copy) in str(caught.value)
        assert named in str(caught.value) or "is damaged: " in str(caught.value)
    (copy / name).write_bytes(data)
    damage.use(copy, copy.parent / "scratch", damage.make_trainer())


def test_a_file_that_the_metadata_does_not_name_is_refused(whole: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    load(whole).save(exported)
    shutil.copy(whole / files.TRAINING, exported)
    with pytest.raises(InputError, match=r"training.safetensors does not belong to it"):
        files.load_tensors(exported, files.TRAINING)


def test_checkpoints_without_digests_are_loaded() -> None:
    old = DATA / "plain" / "checkpoints" / "step-0000058"
    assert files.DIGESTS not in files.load_metadata(old)
    assert files.load_tensors(old, files.TRAINING)
    assert load(old)("su ka").tokens


HOSTILE = {
    "hidden": (100_000, "has shape"),
    "embedding": (2**31 - 1, "has shape"),
    "layers": (10**6, "too few parameters for 1000000 layers"),
    "encoder_layers": (10**6, "too few parameters"),
    "encoder_hidden": (10**30, "encoder_hidden"),
    "window": (2**63, "window must be at most"),
    "max_source": (10**400, "max_source"),
    "dropout": ("0.1", "is damaged"),
    "bidirectional": ("yes", "bidirectional must be bool, got str"),
    "residual": (1, "residual must be bool, got int"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_of_any_size_is_refused_at_once(copy: Path, name: str) -> None:
    value, part = HOSTILE[name]
    meta = files.load_metadata(copy)
    with_meta(copy, model={**meta["model"], name: value})
    started = time.monotonic()
    for action in (load, lambda path: averaged([path])):
        with pytest.raises(InputError, match=part) as caught:
            action(copy)
        assert str(copy) in str(caught.value)
    assert time.monotonic() - started < 5


META: dict[str, tuple[dict[str, Any], str]] = {
    "endless targets": ({"target_bound": {"ratio": 1e9, "longest": 2**30}}, "target_bound"),
    "a text as a ratio": ({"target_bound": {"ratio": "2", "longest": 3}}, "ratio must be float"),
    "no bound": ({"target_bound": [2, 3]}, "LengthBound"),
    "numbers as symbols": ({"source": [1, 2, 3, 4]}, "source vocabulary: entry 0 must be a text"),
    "an empty symbol": ({"target": ["a", "", "b", "c"]}, "target vocabulary: entry 1"),
    "a symbol twice": ({"target": ["a", "b", "b", "c"]}, "symbols must be distinct"),
    "a surrogate": ({"source": ["a", "\ud800", "b", "c"]}, "that UTF-8 cannot encode"),
    "a text as symbols": ({"source": "abcd"}, "source vocabulary must be a list"),
    "another task": ({"task": {"name": "x"}}, "unknown task 'x'"),
    "no task": ({"task": None}, "is damaged"),
    "length of a task": ({"task": {"name": "pairs", "max_length": 2.5}}, "max_length must be int"),
    "path of a task": ({"task": {"name": "pairs", "train": 7}}, "train must be"),
    "subwords": ({"task": {"name": "pairs", "subwords": "AAAA"}}, "subword model is damaged"),
    "no subwords": ({"task": {"name": "pairs", "tokens": "subwords"}}, "subword model is missing"),
}


@pytest.mark.parametrize("kind", META)
def test_metadata_of_another_type_is_refused(copy: Path, kind: str) -> None:
    values, part = META[kind]
    with_meta(copy, **values)
    with pytest.raises(InputError) as caught:
        load(copy)
    assert part in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("dev", [3, "low", [0.5], {"WER": None}, {"WER": "x"}, {"WER": [1]}])
def test_metrics_of_another_type_are_refused(copy: Path, dev: object) -> None:
    with_meta(copy, dev=dev)
    with pytest.raises(InputError, match="dev must be a table of numbers"):
        best_checkpoint([copy])


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a":' * 5000, "NaN", "Infinity", "1e999", "9" * 9999]
)
def test_json_that_is_no_document_is_refused(copy: Path, text: str) -> None:
    for document in (text, f'{{"format_version": 2, "dev": {text}}}'):
        (copy / files.METADATA).write_text(document)
        with pytest.raises(InputError, match="is damaged: ") as caught:
            files.load_metadata(copy)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [files.MODEL, files.METADATA])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_file_is_not_read(copy: Path, name: str, kind: str) -> None:
    (copy / name).unlink()
    if kind == "fifo":
        os.mkfifo(copy / name)
    elif kind == "device":
        (copy / name).symlink_to("/dev/zero")
    else:
        (copy / name).mkdir()
    with pytest.raises(InputError, match=f"is damaged: {name} is not a regular file"):
        load(copy)


NOT_A_MODEL: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "nan": ({"output.bias": torch.full((7,), math.nan)}, "'output.bias' has values that are not"),
    "inf": ({"output.bias": torch.full((7,), math.inf)}, "'output.bias' has values that are not"),
    "too large": ({"output.bias": torch.full((7,), 1e300, dtype=torch.float64)}, "'output.bias'"),
    "whole numbers": ({"output.bias": torch.zeros(7, dtype=torch.int64)}, "'output.bias' must be"),
    "complex": ({"output.bias": torch.zeros(7, dtype=torch.complex64)}, "'output.bias' must be"),
    "missing": ({"output.bias": None}, "the parameter output.bias is missing"),
    "another shape": ({"output.bias": torch.zeros(8)}, "output.bias has shape (8,), expected (7,)"),
    "one more": ({"more": torch.zeros(8)}, "unknown parameter 'more'"),
}


@pytest.mark.parametrize("kind", NOT_A_MODEL)
def test_parameters_are_checked_wherever_they_are_loaded(
    copy: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, part = NOT_A_MODEL[kind]
    with_tensors(copy, files.MODEL, **values)
    for action in (load, lambda path: averaged([path])):
        with pytest.raises(InputError) as caught:
            action(copy)
        assert part in str(caught.value) and str(copy) in str(caught.value)
    pairs, output = tmp_path / "pairs.tsv", tmp_path / "output"
    pairs.write_text("".join(f"{a} {b}\t{b} {a}\n" for a in "abcd" for b in "abcd"))
    train = ["train", "pairs", "--train", str(pairs), "--start-from", str(copy)]
    for command in (["export", str(copy)], train):
        assert main([*command, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("output.bias" in error or "more" in error)
        assert str(copy) in error and not output.exists()


def test_a_model_that_is_not_finite_is_not_saved(whole: Path, tmp_path: Path) -> None:
    predictor = load(whole)
    with torch.no_grad():
        predictor.models[0].output.bias[2] = math.inf
    with pytest.raises(InputError, match=r"'output.bias' has values that are not finite"):
        predictor.save(tmp_path / "saved")
    with torch.no_grad():
        predictor.models[0].output.bias[2] = 1e6  # more than float16 can hold
    with pytest.raises(InputError, match=r"store cannot be float16: .*'output.bias'"):
        predictor.save(tmp_path / "saved", store="float16")
    assert os.listdir(tmp_path) == []
    predictor.save(tmp_path / "saved")


def test_a_link_among_checkpoints_is_unlinked(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(whole, elsewhere)
    link = run / "checkpoints" / "step-0000001"
    link.symlink_to(elsewhere)
    (run / "checkpoints" / "step-0000002").symlink_to(tmp_path / "nowhere")
    (run / "checkpoints" / "step-0000003").write_text("a file")
    assert checkpoints(run) == [link]
    files.remove(link)
    assert checkpoints(run) == [] and files.load_metadata(elsewhere)
    assert sorted(os.listdir(elsewhere)) == sorted(os.listdir(whole))


def test_a_failed_first_save_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.save(tmp_path / "run" / "checkpoints" / "step-0000000", {}, {}, {})
    assert os.listdir(tmp_path) == []


TASKS = {
    "pairs": Pairs(PairsConfig(train="/secret/train", dev="/secret/dev", test="/secret/test")),
    "translate": Translate(TranslateConfig(tokens="words", train="/secret/a,/secret/b")),
    "chat": Chat(ChatConfig(tokens="words", dialogs="/secret/dialogs")),
}


@pytest.mark.parametrize("name", TASKS)
def test_an_exported_model_does_not_name_where_it_was_trained(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task, vocabulary = TASKS[name], Vocabulary(["a", "b"])
    config = replace(damage.MODEL, hidden=4)
    model = Seq2Seq(config, len(vocabulary), len(vocabulary))
    Predictor(model, vocabulary, vocabulary, task=task).save(tmp_path / "saved")
    meta = {
        "model": asdict(config), "training": {}, "task": task.to_json(),
        "source": ["a", "b"], "target": ["a", "b"], "start_from": "/secret/start",
        "teacher": ["/secret/teacher"], "position": {"step": 3},
    }  # fmt: skip
    save_model(tmp_path / "other", meta, model.state_dict(), "float32")
    for exported in (tmp_path / "saved", tmp_path / "other"):
        assert "secret" not in (exported / files.METADATA).read_text()
        assert load(exported)("a b").source == ("a", "b")
        capsys.readouterr()
        assert main(["evaluate", str(exported)]) == 2
        assert "the model has no test set: name a file with --test" in capsys.readouterr().err
