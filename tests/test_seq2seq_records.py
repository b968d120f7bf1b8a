"""`predict --format tsv` and `json`, and what they are made of in Python."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LETTERS, WORDS, checkpoint, predictor

from fused_attn.cli import main
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.records import Line, as_json, as_text, as_tsv
from fused_attn.seq2seq.vocabulary import BOS, EOS, UNKNOWN

SOURCES = ["abc", "d", "ébda"]
LINES = b"abc\n\nx\td\nd\nb\xff\n\xc3\xa9bda\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoint(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """What `predict` prints for lines of standard input, and what it writes to a file."""

    def run(data: bytes, *argv: str, code: int) -> str:
        source, output = tmp_path / "in", tmp_path / "out"
        source.write_bytes(data)
        capfd.readouterr()
        with source.open() as file:
            monkeypatch.setattr("sys.stdin", file)
            assert main(["predict", *argv]) == code
        text = capfd.readouterr().out
        if "--sample" not in argv:
            files = ["--input", str(source), "--output", str(output)]
            assert main(["predict", *argv, *files]) == code
            assert output.read_bytes() == text.encode()
        return text

    return run


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def loaded(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    lines = text.removesuffix("\n").split("\n")
    return [json.loads(line, parse_constant=no_constant) for line in lines]


@torch.no_grad()
def log_probs(source: str, tokens: list[str], **options: Any) -> list[float]:
    """The log probability of each symbol and of EOS, by one teacher-forced call."""
    found = predictor(**options)
    ids = found.target.encode(tokens)
    encoded = torch.tensor([found.source.encode(source)])
    lengths = torch.tensor([len(source)])
    logits, _ = found.models[0](encoded, lengths, torch.tensor([[BOS, *ids]]))
    scores = torch.log_softmax(logits[0].double(), dim=-1)
    return [float(scores[step, symbol]) for step, symbol in enumerate((*ids, EOS))]


def test_json_has_an_object_for_each_line(model: str, printed: Any) -> None:
    records = loaded(
        printed(LINES, model, "--format", "json", "--beam", "4", "--nbest", "3", code=1)
    )
    assert [record["source"] for record in records] == ["abc", "", "x\td", "d", "b\ufffd", "ébda"]
    assert ["error" in record for record in records] == [False, False, True, False, True, False]
    assert records[4]["error"] == "not UTF-8 text" and "'x'" in records[2]["error"]
    for record in records:
        if record["source"] not in SOURCES:
            assert record["targets"] == []
            continue
        assert record["source_tokens"] == list(record["source"])
        assert [each["rank"] for each in record["targets"]] == [1, 2, 3]
        for each in record["targets"]:
            assert each["target"] == " ".join(each["tokens"]) and "alignment" not in each
            *tokens, end = log_probs(record["source"], each["tokens"])
            assert each["token_log_probs"] == pytest.approx(tokens, abs=2e-5)
            assert each["log_prob"] == pytest.approx(sum(tokens) + end, abs=2e-5)


def test_json_with_alignment(model: str, printed: Any) -> None:
    text = printed(LINES, model, "--format", "json", "--with-alignment", code=1)
    for record in loaded(text):
        for each in record["targets"]:
            weights = torch.tensor(each["alignment"])
            assert weights.shape == (len(each["tokens"]), len(record["source_tokens"]))
            assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * len(weights), abs=1e-4)


def rows_of(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.removesuffix("\n").split("\n")]


def test_tsv_has_a_row_for_each_target(model: str, printed: Any) -> None:
    options = ["--beam", "4", "--nbest", "2"]
    rows = rows_of(printed(LINES, model, "--format", "tsv", *options, code=1))
    records = loaded(printed(LINES, model, "--format", "json", *options, code=1))
    expected: list[list[Any]] = []
    for record in records:
        source = record["source"].replace("\t", " ")
        for each in record["targets"]:
            numbers = [[each["log_prob"]], each["token_log_probs"]]
            shown = [" ".join(f"{number:.6f}" for number in part) for part in numbers]
            head = [source, str(each["rank"]), each["target"]]
            expected.append([*head, *shown, " ".join(each["tokens"])])
        if not record["targets"]:
            expected.append([source, "", "", "", "", ""])
    assert rows == expected and len(rows) == 9
    linked = rows_of(printed(LINES, model, "--format", "tsv", "--with-alignment", code=1))
    weights = loaded(printed(LINES, model, "--format", "json", "--with-alignment", code=1))
    assert [len(row) for row in linked] == [7] * 6
    for row, record in zip(linked, weights, strict=True):
        for each in record["targets"]:
            best = [max(range(len(w)), key=w.__getitem__) for w in each["alignment"]]
            links = sorted((source, target) for target, source in enumerate(best))
            assert row[6] == " ".join(f"{s}-{t}" for s, t in links)


@pytest.mark.parametrize("form", ["tsv", "json"])
def test_drawn_and_averaged_targets(model: str, form: str, printed: Any) -> None:
    drawn = ["--format", form, "--sample", "--seed", "3"]
    assert printed(b"abc\n", model, *drawn, code=0) == printed(b"abc\n", model, *drawn, code=0)
    same = ["--ensemble", model, "--beam", "2"]
    text = printed(b"abc\n", model, "--format", form, *same, code=0)
    assert any(word in text for word in WORDS)


def test_an_unknown_symbol_is_replaced_in_records(tmp_path: Path, printed: Any) -> None:
    """The model writes only <unk>, which is the source symbol with the largest weight."""
    options = {"words": (UNKNOWN,), "letters": (UNKNOWN, *LETTERS)}
    path = str(checkpoint(tmp_path / "unknown", **options))
    options = ["--min-length", "3", "--max-length", "3", "--format", "json", "--with-alignment"]
    (record,) = loaded(printed(b"abzd\n", path, "--replace-unknown", *options, code=0))
    (found,) = record["targets"]
    best = [max(range(4), key=weights.__getitem__) for weights in found["alignment"]]
    assert found["tokens"] == [record["source_tokens"][position] for position in best]
    assert found["target"] == " ".join(found["tokens"]) and UNKNOWN not in found["tokens"]
    (record,) = loaded(printed(b"abzd\n", path, *options, code=0))
    assert record["targets"][0]["tokens"] == [UNKNOWN] * 3


STRANGE = ("a b", "\t", "new\nline", "\u2028", "\x85", '"', "\\", "ü")


def test_symbols_that_would_break_a_line(tmp_path: Path, printed: Any) -> None:
    """Symbols from Python may have anything in them."""
    path = str(checkpoint(tmp_path / "strange", words=STRANGE))
    options = ["--beam", "80", "--nbest", "73", "--max-length", "2"]
    text = printed(b"abc\nde\n", path, "--format", "json", *options, code=0)
    assert len(text.splitlines()) == 2
    records = loaded(text)
    tokens = [each["tokens"] for record in records for each in record["targets"]]
    assert len(tokens) == 2 * (1 + 8 + 64)
    assert {symbol for each in tokens for symbol in each} == {*STRANGE}
    text = printed(b"abc\nde\n", path, "--format", "tsv", *options, code=0)
    rows = rows_of(text)
    assert len(rows) == len(text.splitlines()) == len(tokens)
    for row, each in zip(rows, tokens, strict=True):
        assert len(row) == 6
        assert len(row[5].split(" ")) == len(each) == len(row[4].split(" ")) or not each
    text = printed(b"abc\nde\n", path, *options, code=0)
    assert len(text.splitlines()) == 2 * 73


def test_numbers_are_json_and_short() -> None:
    found = Prediction(("a",), ("b",), "b", -math.inf, (math.nan, -1e-9, -1.23456789), 0.0)
    (target,) = found.as_dict()["targets"]
    assert target["log_prob"] is None and target["token_log_probs"] == [None, 0.0, -1.234568]
    assert "-0.0" not in as_json(Line("a"), found) and "NaN" not in as_json(Line("a"), found)
    assert as_tsv(Line("a"), found) == ["a\t1\tb\t-inf\tnan 0.000000 -1.234568\tb"]
    assert as_text(found, 3) == ["b", "", ""] and as_text(None, 2) == ["", ""]


def test_a_prediction_in_python_is_the_record_of_the_command(model: str, printed: Any) -> None:
    found = predictor()("abc", beam=3, nbest=2)
    (record,) = loaded(
        printed(b"abc\n", model, "--format", "json", "--beam", "3", "--nbest", "2", code=0)
    )
    assert found.as_dict() == record
    assert found.source_text == "abc"
    assert predictor()([["a", "b"]])[0].source_text == "ab"
    for rank, each in enumerate(found.as_dict(alignment=True)["targets"]):
        weights = found.alternatives[rank].alignment
        assert weights is not None
        torch.testing.assert_close(torch.tensor(each["alignment"]), weights, atol=1e-6, rtol=0)
    plain = predictor()("abc", alignments=False)
    assert plain.as_dict(alignment=True)["targets"][0]["alignment"] is None
