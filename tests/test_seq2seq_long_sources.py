"""A source longer than those of the training gets a note, and in Python a warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from small_models import LETTERS, checkpoint, predictor

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import Predictor

LONGEST = 4
LONG = "abcde"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "model", longest_source=LONGEST)


def notes(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


ENDING = "has 5 symbols; the longest source of the training had 4: its target may be incomplete"


def test_commands_print_a_note(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["predict", str(model), "abcd", LONG, "a"]) == 0
    assert notes(capfd) == [f"note: argument 2 {ENDING}"]
    page = ["--output", str(tmp_path / "page.html")]
    assert main(["explain", str(model), LONG, *page]) == 0
    assert notes(capfd) == [f"note: TEXT {ENDING}"]
    (tmp_path / "lines").write_text(f"abcd\n{LONG}\n")
    with (tmp_path / "lines").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["chat", str(model)]) == 0
    assert notes(capfd) == [f"note: this message {ENDING}"]
    (tmp_path / "pairs").write_text(f"abcd\tein\n{LONG}\tzwei\n{LONG}e\tdrei\n")
    evaluate = ["evaluate", str(model), "--test", str(tmp_path / "pairs")]
    assert main([*evaluate, "--json"]) == 0
    out, err = capfd.readouterr()
    expected = (
        "2 of 3 lines are longer than the longest source of the training (4 symbols): "
        "their targets may be incomplete"
    )
    assert f"note: {expected}" in err.splitlines() and expected in json.loads(out)["notes"]


def test_one_long_source_of_several(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs").write_text(f"abcd\tein\n{LONG}\tzwei\n")
    assert main(["evaluate", str(model), "--test", str(tmp_path / "pairs")]) == 0
    expected = (
        "note: 1 of 2 lines is longer than the longest source of the training (4 symbols): "
        "its target may be incomplete"
    )
    assert expected in notes(capfd)


def test_after_ten_notes_there_is_a_count(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.write_text(f"ab\n{LONG}\n" * 12)
    files_ = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert main(["predict", str(model), *files_]) == 0
    found = notes(capfd)
    assert found[:-1] == [f"note: line {number} {ENDING}" for number in range(2, 22, 2)]
    assert found[-1] == (
        "note: 12 of 24 lines are longer than the longest source of the training (4 symbols)"
    )


def test_a_model_that_does_not_know(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As in the checkpoints of earlier versions."""
    path = checkpoint(tmp_path / "model")
    assert main(["predict", str(path), "a" * 300]) == 0
    assert notes(capfd) == []
    loaded = seq2seq.load(path)
    assert loaded.longest_source is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded("a" * 300)


def test_python_warns_once_a_call(model: Path, tmp_path: Path) -> None:
    loaded = seq2seq.load(model)
    assert loaded.longest_source == LONGEST
    with pytest.warns(UserWarning, match=f"^source 1 {ENDING}$") as found:
        loaded(LONG)
    assert [warning.filename for warning in found] == [__file__]
    for call in (loaded, loaded.predict):
        with pytest.warns(UserWarning, match=r"^source 2 has 5 .* \(and 1 more\)$") as found:
            call(["abcd", LONG, LONG])
        assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match="^source 3 has 5") as found:
        assert len(list(loaded(iter(["a", "b", LONG, "c", LONG, LONG]), batch_size=2))) == 6
    assert len(found) == 1
    with pytest.warns(UserWarning, match="^source 2 has 5") as found:
        seq2seq.evaluate(loaded, [("abcd", "ein"), (LONG, "zwei")])
    assert [warning.filename for warning in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(["abcd", "a"])
    loaded.save(tmp_path / "saved", store="float16")
    assert seq2seq.load(tmp_path / "saved").longest_source == LONGEST


def test_an_ensemble_takes_the_smallest_known(model: Path, tmp_path: Path) -> None:
    unknown = checkpoint(tmp_path / "unknown", seed=1)
    other = checkpoint(tmp_path / "other", seed=2, longest_source=9)
    assert Predictor.load(unknown, other, model).longest_source == LONGEST
    assert Predictor.load(unknown, other).longest_source == 9
    assert Predictor.load(unknown, unknown).longest_source is None


@pytest.mark.parametrize("value", ["five", 0, -3, 2.5, True, [4]])
def test_a_length_that_is_none_is_damage(
    value: object, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = files.load_metadata(model)
    monkeypatch.setattr(files, "load_metadata", lambda _: {**metadata, "longest_source": value})
    with pytest.raises(InputError, match="is damaged: longest_source must be a positive whole"):
        seq2seq.load(model)


def test_it_is_counted_in_symbols() -> None:
    words = predictor(
        [*LETTERS, "long-word"],
        longest_source=2,
        tokens={"source_tokens": "words", "target_tokens": "words"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words("long-word a")
    with pytest.warns(UserWarning, match="has 3 symbols"):
        words("long-word a b")
