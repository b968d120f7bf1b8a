"""The command in this process: train, predict, evaluate, and what they refuse."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.tasks import cmudict
from fused_attn.seq2seq.training.trainer import Trainer

TINY = ["--hidden", "16", "--embedding", "8", "--batch-size", "32", "--epochs", "2"]


@pytest.fixture(scope="module")
def lexicon() -> cmudict.Lexicon:
    """A few words of the dictionary, so that a test takes no seconds."""
    whole = cmudict.load_dictionary()
    return {word: whole[word] for word in ["hello", "world", *cmudict.by_hash(whole)[:600]]}


@pytest.fixture(autouse=True)
def _small_dictionary(monkeypatch: pytest.MonkeyPatch, lexicon: cmudict.Lexicon) -> None:
    monkeypatch.setattr(cmudict, "load_dictionary", lambda: lexicon)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, lexicon: cmudict.Lexicon) -> Path:
    """A finished run. Do not change it."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmudict, "load_dictionary", lambda: lexicon)
        assert main(["train", "g2p", "--output", str(directory), *TINY]) == 0
    return directory


Fails = Callable[..., None]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must exit with code 2 and one line that has all the given parts."""

    def check(argv: list[object], *parts: str) -> None:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as exit:  # from the parser
            code = exit.code
        lines = capfd.readouterr().err.splitlines(keepends=True)
        error = "".join(line for line in lines if not line.startswith("epoch "))  # progress
        assert code == 2, error
        assert error.count("\n") == 1 and error.endswith("\n")
        assert [part for part in ("error: ", *parts) if part not in error] == [], error

    return check


def log_of(directory: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of the steps, and of the epochs without their time."""
    tables = []
    for name in ("steps.csv", "epochs.csv"):
        with (directory / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for row in tables[1]:
        float(row.pop("seconds"))
    return tables[0], tables[1]


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / "checkpoints"))


def test_train_writes_log_and_checkpoints(run: Path) -> None:
    steps, epochs = log_of(run)
    assert [row["step"] for row in steps] == [str(step) for step in range(1, len(steps) + 1)]
    assert {row["epoch"] for row in steps} == {"1", "2"}
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(0 <= float(row["WER"]) <= 1 and float(row["PER"]) > 0 for row in epochs)
    assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])
    assert names(run) == [
        f"step-{len(steps) // 2:07}-epoch-01", f"step-{len(steps):07}-epoch-02",
    ]  # fmt: skip


def test_train_keeps_the_best_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fused_attn.seq2seq.inference import evaluate

    wer = iter([0.9, 0.5, 0.8, 0.7, 0.6])
    monkeypatch.setattr(evaluate, "rates", lambda *_: {"WER": next(wer), "PER": 0.1})
    options = [*TINY[:-1], "5", "--limit-words", "100"]
    assert main(["train", "g2p", "--output", str(tmp_path), *options]) == 0
    assert [name[-8:] for name in names(tmp_path)] == ["epoch-02", "epoch-04", "epoch-05"]
    assert "epoch-02" in capfd.readouterr().out.splitlines()[-1]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have the process receive SIGINT after so many steps."""
    step = Trainer._step

    def counted(self: Trainer, batch: object) -> object:
        report = step(self, batch)  # type: ignore[arg-type]
        if report.step == steps:
            os.kill(os.getpid(), 2)
        return report

    monkeypatch.setattr(Trainer, "_step", counted)


@pytest.mark.parametrize("steps", [1, 19, 25])  # 19 is the end of the first epoch
def test_resume_repeats_the_uninterrupted_run(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], steps: int,
) -> None:  # fmt: skip
    assert names(run)[0].startswith("step-0000019-")
    train = ["train", "g2p", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        assert main([*train, *TINY]) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        f"stopped at step {steps} of 38; resume with: "
        f"fused-attn train g2p --output {tmp_path} --resume"
    )
    assert main([*train, "--resume"]) == 0
    assert log_of(tmp_path) == log_of(run)
    assert names(tmp_path)[-1] == names(run)[-1]
    for file in (files.MODEL, files.TRAINING, files.METADATA):
        last = (directory / "checkpoints" / names(run)[-1] / file for directory in (tmp_path, run))
        assert next(last).read_bytes() == next(last).read_bytes()


def test_resume_after_a_kill_forgets_the_lost_steps(tmp_path: Path, run: Path) -> None:
    """A kill leaves log lines after the last checkpoint, half a line, and a temporary."""
    directory = tmp_path / "run"
    shutil.copytree(run, directory)
    shutil.rmtree(directory / "checkpoints" / names(run)[-1])
    (directory / "checkpoints" / ".writing-abc").mkdir()
    with (directory / "steps.csv").open("a") as log:
        log.write("39,3,1.2")
    assert main(["train", "g2p", "--output", str(directory), "--resume"]) == 0
    assert log_of(directory) == log_of(run)
    assert names(directory) == names(run)


def test_resuming_a_finished_run_does_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = names(run), log_of(run)
    assert main(["train", "g2p", "--output", str(run), "--resume", *TINY]) == 0
    assert "is complete: all 38 steps are done" in capfd.readouterr().out
    assert (names(run), log_of(run)) == before


def test_train_refuses(fails: Fails, run: Path, tmp_path: Path) -> None:
    train = ["train", "g2p", "--output"]
    fails([*train, run], "is not an empty directory", "--resume")
    fails([*train, run, "--resume", "--seed", "9"], "--seed is not that of the run in")
    fails([*train, tmp_path / "none", "--resume"], "nothing to resume", "no such directory")
    fails([*train, tmp_path, "--resume"], "contains no checkpoint")
    new = [*train, tmp_path / "new"]
    fails([*new, "--hidden", "0"], "--hidden must be a positive whole number, got 0")
    fails([*new, "--hidden", "wide"], "--hidden", "invalid int value: 'wide'")
    fails([*new, "--batch-size", "-1"], "--batch-size must be")
    scores = "--score must be one of dot, general, concat, location, none, got 'cosine'"
    fails([*new, "--score", "cosine"], scores)
    fails([*new, "--cell", "srn"], "--cell must be one of lstm, gru, rnn, got 'srn'")
    fails([*new, "--share"], "--share needs an encoder and a decoder of the same shape")
    fails([*new, "--tie", "all"], "--tie all needs one vocabulary for source and target")
    fails([*new, "--coverage"], "--coverage belongs to the score concat, got 'general'")
    fails([*new, "--sampling", "often"], "--sampling must be one of none, constant, linear")
    fails(
        [*new, "--sampling", "linear", "--sampling-max", "2"],
        "--sampling-max must be a share in 0..1",
    )
    fails([*new, "--dropout", "1"], "--dropout must be at least 0 and below 1")
    fails([*new, "--lr", "nan"], "--lr must be a positive number")
    fails([*new, "--max-steps", "0"], "--max-steps must be")
    fails([*new, "--limit-words", "0"], "--limit-words must be")
    fails([*new, "--limit-words", "3"], "too few")
    fails([*new, "--threads", "0"], "--threads must be")
    fails([*new, "--backend", "gpu"], "backend must be one of", "'gpu'")
    fails(["train", "spin", "--output", tmp_path], "TASK must be one of g2p, scan", "'spin'")
    fails([*new, "--split", "jump"], "--split is not an option of the task g2p")
    fails([*train, run, "--resume", "--hidden", "17"], "--hidden is not that of the run in")
    fails(["train", "scan", "--output", run, "--resume"], "the task of the run in", "is g2p")
    fails(
        ["train", "reverse", "--output", tmp_path / "new", "--test", run], "--test is not an option"
    )
    fails(["train", "g2p"], "required: --output")
    fails([*new, "--test", tmp_path / "none"], "cannot read", "No such file")
    fails([*new, "--test", tmp_path], "cannot read", "Is a directory")
    (tmp_path / "words").write_bytes(b"\xff\xfe")
    fails([*new, "--test", tmp_path / "words"], "not UTF-8")
    (tmp_path / "words").write_text("nosuchword\n")
    fails([*new, "--test", tmp_path / "words"], "none of the test words")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_ends_the_training_and_keeps_the_checkpoints(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) >= 12:  # two checkpoints of five each, and a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        fails(["train", "g2p", "--output", tmp_path, *TINY], "No space left on device")
    assert len(names(tmp_path)) == 2
    assert main(["predict", str(tmp_path), "hello"]) == 0
    assert main(["train", "g2p", "--output", str(tmp_path), "--resume"]) == 0


def test_predict_words(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), "hello", "World's", " HELLO "]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0] == lines[2]
    assert main(["predict", str(run / "checkpoints" / names(run)[-1]), "hello"]) == 0


@pytest.fixture
def lines_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Give bytes to standard input."""
    opened = []

    def give(data: bytes) -> None:
        (tmp_path / "stdin").write_bytes(data)
        opened.append((tmp_path / "stdin").open())
        monkeypatch.setattr("sys.stdin", opened[-1])

    yield give
    for file in opened:
        file.close()


def test_predict_searches(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A beam, its n best a line each, scores, draws, and an ensemble."""

    def predict(*options: object, words: tuple[str, ...] = ("hello", "world")) -> list[str]:
        assert main(["predict", str(run), *words, *map(str, options)]) == 0
        return capfd.readouterr().out.splitlines()

    capfd.readouterr()
    best = predict("--beam", 4)
    several = predict("--beam", 4, "--nbest", 3, "--scores")
    assert len(best) == 2 and len(several) == 6
    scores, targets = zip(*(line.split("\t") for line in several), strict=True)
    assert [targets[0], targets[3]] == best and len(set(targets[:3])) == 3
    assert sorted(map(float, scores[:3]), reverse=True) == list(map(float, scores[:3]))
    assert predict("--beam", 4, "--ensemble", run) == best
    assert predict("--sample", "--seed", 3) == predict("--sample", "--seed", 3)
    short = predict("--beam", 3, "--nbest", 3, "--max-length", 1, "--min-length", 1)
    assert len(short) == 6 and all(len(line.split()) == 1 for line in short)
    assert len(predict("--max-length", 2, "--min-length", 2)[0].split()) == 2
    capfd.readouterr()
    assert main(["evaluate", str(run), "--json", "--limit", "5", "--beam", "2"]) == 0
    assert json.loads(capfd.readouterr().out)["count"] == 5


def test_search_options_are_checked(run: Path, fails: Fails) -> None:
    predict = ["predict", run, "a"]
    fails([*predict, "--nbest", "2"], "--nbest must be at most beam = 1, got 2")
    fails([*predict, "--beam", "0"], "--beam must be a positive whole number, got 0")
    fails(
        [*predict, "--beam", "2", "--length-penalty", "wu"],
        "--length-penalty must be one of none, average",
    )
    fails([*predict, "--ensemble", run / "none"], "no checkpoint at")
    fails(
        ["evaluate", run, "--sample", "--top-p", "0"],
        "--top-p must be above 0 and at most 1, got 0.0",
    )


def test_a_model_without_attention(
    tmp_path: Path, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "none"
    assert main(["train", "g2p", "--output", str(directory), *TINY, "--score", "none"]) == 0
    assert main(["predict", str(directory), "hello"]) == 0
    capfd.readouterr()
    picture = tmp_path / "a.png"
    fails(["predict", directory, "a", "--alignments", picture], "needs a model with attention")


def test_explain(
    run: Path, tmp_path: Path, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    capfd.readouterr()
    assert main(["explain", str(run), "hello", "--output", str(output), "--beam", "3"]) == 0
    assert capfd.readouterr().out.startswith(f"{output}: hello -> ")
    assert "<!doctype html>" in output.read_text()
    fails(["explain", run, "hello", "--output", tmp_path / "no" / "a.html"], "no directory")
    fails(["explain", run, "héllo", "--output", output], "unknown symbol 'é'")


def test_predict_lines(
    run: Path, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(run), "hello", "world"])
    expected = capfd.readouterr().out
    lines_in(b"hello\r\nWorld")  # the last line may lack its end
    assert main(["predict", str(run)]) == 0
    assert capfd.readouterr().out == expected
    lines_in(b"")
    assert main(["predict", str(run)]) == 0
    assert capfd.readouterr().out == ""


def test_strict_predict_refuses_lines_after_printing_those_before(
    run: Path, fails: Fails, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", run, "--strict"]
    lines_in(b"hello\n\nworld\n")
    fails(predict, "line 2: the source is empty")
    lines_in(b"hello\nna\xc3\xafve\n")
    fails(predict, "line 2: unknown symbol 'ï'; known symbols: ' a b c")
    lines_in(b"\xff\n")
    fails(predict, "line 1 is not UTF-8 text")
    fails([*predict, "hello", "two words"], "argument 2: unknown symbol ' '")
    fails([*predict, ""], "argument 1: the source is empty")
    lines_in(b"hello\nhello\n3\n")
    main(["predict", str(run), "--strict"])
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_predict_draws(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "map.png"
    assert main(["predict", str(run), "hello", "world", "--alignments", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["map.png"]
    assert capfd.readouterr().err == ""
    assert main(["predict", str(run), *["hello"] * 13, "--alignments", str(picture)]) == 0
    assert "shows the first 12 of 13 sources" in capfd.readouterr().err


def test_predict_refuses(run: Path, fails: Fails, tmp_path: Path) -> None:
    fails(["predict"], "required: MODEL")
    fails(["predict", tmp_path / "none", "a"], "no checkpoint at", "no such directory")
    fails(["predict", tmp_path, "a"], "no checkpoint at", "contains no checkpoint")
    fails(["predict", run, "a", "--backend", "gpu"], "backend must be one of")
    fails(["predict", run, "a", "--alignments", tmp_path / "map.jpg"], ".png")
    fails(["predict", run, "a", "--alignments", tmp_path / "none" / "map.png"], "no directory")
    file = tmp_path / "file"
    file.touch()
    fails(["predict", file, "a"], "not a directory")


def test_predict_refuses_damaged_checkpoints(run: Path, fails: Fails, tmp_path: Path) -> None:
    whole = run / "checkpoints" / names(run)[-1]
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    model = (whole / files.MODEL).read_bytes()
    (copy / files.MODEL).write_bytes(model[:-100])
    fails(["predict", copy, "a"], f"the checkpoint {copy} is damaged")
    (copy / files.MODEL).write_bytes(model)
    meta = json.loads((whole / files.METADATA).read_text())
    del meta[files.DIGESTS]  # a hostile file may have none, or right ones

    def with_meta(**values: object) -> None:
        (copy / files.METADATA).write_text(json.dumps({**meta, **values}))

    with_meta(format_version=1)
    fails(["predict", copy, "a"], "format version 1", "reads format version 2")
    with_meta(model={**meta["model"], "hidden": 24})
    fails(["predict", copy, "a"], "is damaged", "has shape", "expected")
    with_meta(model={"depth": 3})
    fails(["predict", copy, "a"], "is damaged", "depth")
    (copy / files.METADATA).write_text(json.dumps({"format_version": 2}))
    fails(["predict", copy, "a"], "is damaged: 'model' is missing")
    (copy / files.METADATA).write_text("{")
    fails(["predict", copy, "a"], "is damaged")


def test_evaluate(run: Path, lexicon: cmudict.Lexicon, capfd: pytest.CaptureFixture[str]) -> None:
    count = len(cmudict.split_words(lexicon).test)
    capfd.readouterr()
    assert main(["evaluate", str(run), "--json", "--samples", "3"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["count"] == count
    assert report["WER"] == report["wrong"] / count
    assert report["PER"] == report["edits"] / report["symbols"]
    for sample in report["samples"]:
        word = "".join(sample["source"])
        assert tuple(sample["references"][0]) == lexicon[word][0]
        assert main(["predict", str(run), word]) == 0
        assert capfd.readouterr().out.split() == sample["model"]
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    words, wer, per, blank, heads, *samples = capfd.readouterr().out.splitlines()
    assert words.split() == ["words", str(count)]
    assert wer.split() == ["WER", f"{100 * report['WER']:.2f}", "%"]
    assert per.split() == ["PER", f"{100 * report['PER']:.2f}", "%"]
    assert blank == "" and heads.split() == ["source", "model", "reference"]
    assert [line.split()[0] for line in samples] == [
        "".join(s["source"]) for s in report["samples"][:2]
    ]


def test_evaluate_on_given_words(
    run: Path, lexicon: cmudict.Lexicon, tmp_path: Path, fails: Fails,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    split = cmudict.split_words(lexicon)
    listed = [*split.train[:2], split.test[0], "nosuchword"]
    (tmp_path / "words").write_text("\n".join(listed))
    evaluate = ["evaluate", str(run), "--test", str(tmp_path / "words")]
    capfd.readouterr()
    assert main([*evaluate, "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["count"] == 3
    assert "1 word is not in the dictionary" in captured.err
    assert "2 of these words are in the training set" in captured.err
    (tmp_path / "words").write_text("nosuchword")
    fails(evaluate, "none of the words")
    fails(["evaluate", run, "--limit", "0"], "--limit must be positive")


def test_a_model_keeps_its_test_words(
    tmp_path: Path, lexicon: cmudict.Lexicon, capfd: pytest.CaptureFixture[str]
) -> None:
    words = cmudict.by_hash(lexicon)[:40]
    (tmp_path / "words").write_text("\n".join(words))
    train = ["train", "g2p", "--output", str(tmp_path / "run"), *TINY, "--max-steps", "2"]
    assert main([*train, "--test", str(tmp_path / "words")]) == 0
    (tmp_path / "words").unlink()
    capfd.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--samples", "40"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert {"".join(sample["source"]) for sample in report["samples"]} == set(words)


def test_threads(run: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["predict", str(run), "hello", "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
