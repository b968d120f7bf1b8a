"""Alignments as links and as weights, the error rate by hand, and copied symbols."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fused_attn.cli import main
from fused_attn.seq2seq.data.links import parse_pharaoh, pharaoh
from fused_attn.seq2seq.inference.alignments import hard_links, replace_unknown, soft_alignment
from fused_attn.seq2seq.metrics import alignment_error_rate

WEIGHTS = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1], [0.0, 0.25, 0.75], [0.5, 0.4, 0.1]])


def test_links_of_weights() -> None:
    assert hard_links(WEIGHTS) == [(1, 0), (0, 1), (2, 2), (0, 3)]
    assert pharaoh(hard_links(WEIGHTS)) == "0-1 0-3 1-0 2-2"
    assert hard_links(torch.zeros(0, 3)) == [] and pharaoh([]) == ""
    assert soft_alignment(WEIGHTS[:2]) == "0.1000 0.7000 0.2000\t0.6000 0.3000 0.1000"


def test_links_are_read_back() -> None:
    sure, possible = parse_pharaoh("0-1 1?0 2p2 10-3")
    assert sure == {(0, 1), (10, 3)} and possible == {(0, 1), (10, 3), (1, 0), (2, 2)}
    assert parse_pharaoh("") == (set(), set())
    links = hard_links(WEIGHTS)
    assert parse_pharaoh(pharaoh(links))[0] == set(links)
    for bad in ("0", "0-", "-1-2", "a-1", "0-1-2", "0.5-1"):
        with pytest.raises(ValueError, match=f"{re.escape(repr(bad))} is not a link"):
            parse_pharaoh(f"0-0 {bad}")


def test_the_error_rate_by_hand() -> None:
    """Two sentences: |A| = 5, |S| = 4, |A and S| = 3, |A and P| = 4: 1 - 7 / 9."""
    gold = [parse_pharaoh("0-0 1-1 2?2"), parse_pharaoh("0-0 1-1")]
    found = [{(0, 0), (2, 2), (1, 1)}, {(0, 0), (0, 1)}]
    assert alignment_error_rate(found, gold) == pytest.approx(1 - 7 / 9)
    perfect = [sure for sure, _ in gold]
    assert alignment_error_rate(perfect, gold) == 0.0
    assert alignment_error_rate([{(5, 5)}, {(6, 6)}], gold) == 1.0
    with pytest.raises(ValueError, match="there are no links"):
        alignment_error_rate([set()], [(set(), set())])


def test_unknown_symbols_are_copied() -> None:
    target, source = ("ich", "<unk>", "<unk>", "."), ("the", "cat", "Maria")
    assert replace_unknown(target, source, WEIGHTS) == ("ich", "the", "Maria", ".")
    assert replace_unknown(("a", "b"), source, WEIGHTS[:2]) == ("a", "b")
    assert replace_unknown(target, source, None) == target


NAMES = ["anna", "boris", "clara", "dora", "emil", "frida", "gustav", "hanna"]


@pytest.fixture(scope="module")
def greeter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on ``hello NAME`` -> ``hallo NAME``; rare names are unknown symbols."""
    directory = tmp_path_factory.mktemp("greeter")
    pairs = (("hello", "hallo"), ("bye", "tschüss"))
    lines = [f"{a} {name}\t{b} {name}" for name in NAMES for a, b in pairs]
    rare = [f"{a} rare{i}\t{b} rare{i}" for i in range(60) for a, b in pairs]
    file = directory / "lines.tsv"
    file.write_text("\n".join([*lines * 12, *rare]) + "\n")
    options = ["--hidden", "32", "--embedding", "16", "--epochs", "16", "--batch-size", "32"]
    options += ["--lr", "0.01", "--dropout", "0", "--min-count", "8", "--dev", str(file)]
    output = directory / "run"
    assert main(["train", "pairs", "--output", str(output), "--train", str(file), *options]) == 0
    # The last one: unknown names are wrong in all checkpoints, so the best one says little.
    return max((output / "checkpoints").iterdir())


def test_a_name_that_was_never_seen_is_copied(
    greeter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["predict", str(greeter), "hello zacharias", "bye anna"]) == 0
    assert capfd.readouterr().out.splitlines() == ["hallo <unk>", "tschüss anna"]
    assert main(["predict", str(greeter), "hello zacharias", "--replace-unknown"]) == 0
    assert capfd.readouterr().out.splitlines() == ["hallo zacharias"]


def test_links_and_their_error_rate(
    greeter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    links, rows, gold = tmp_path / "a.pharaoh", tmp_path / "a.soft", tmp_path / "gold"
    sources = ["hello anna", "bye boris", "hello clara"]
    assert main(["predict", str(greeter), *sources, "--alignments", str(links)]) == 0
    assert main(["predict", str(greeter), *sources, "--alignments", str(rows)]) == 0
    lines = links.read_text().splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r"\d-0 \d-1|\d-1 \d-0", line) for line in lines)
    for line, soft in zip(lines, rows.read_text().splitlines(), strict=True):
        weights = [[float(w) for w in row.split()] for row in soft.split("\t")]
        assert all(sum(row) == pytest.approx(1.0, abs=1e-3) for row in weights)
        assert sorted(f"{row.index(max(row))}-{t}" for t, row in enumerate(weights)) == line.split()
    capfd.readouterr()
    gold.write_text(links.read_text())
    assert main(["aer", str(links), str(gold)]) == 0
    assert capfd.readouterr().out == "AER  0.00 %\n"
    gold.write_text("0-0\n")
    assert main(["aer", str(links), str(gold)]) == 2
    assert "has 3 lines, but" in capfd.readouterr().err
    gold.write_text("0-0\n0=0\n0-0\n")
    assert main(["aer", str(links), str(gold)]) == 2
    assert f"{gold}, line 2: '0=0' is not a link" in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "share"), [("float32", 1.0), ("float16", 0.6), ("int8", 0.35)])
def test_an_exported_model_predicts_the_same(
    kind: str,
    share: float,
    greeter: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The export is smaller, has no training state, and loads by name if the package has it."""
    from fused_attn.seq2seq.checkpoints import find

    exported = tmp_path / "models" / "greeter"
    assert main(["export", str(greeter), "--output", str(exported), "--store", kind]) == 0
    assert "MB" in capfd.readouterr().out
    assert sorted(path.name for path in exported.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]
    best = find.find_checkpoint(greeter) / "model.safetensors"
    assert (exported / "model.safetensors").stat().st_size <= share * best.stat().st_size
    expected = ["tschüss clara"]
    assert main(["predict", str(exported), "bye clara"]) == 0
    assert capfd.readouterr().out.splitlines() == expected
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "models")
    assert main(["predict", "greeter", "bye clara"]) == 0
    assert capfd.readouterr().out.splitlines() == expected
    assert main(["export", str(greeter), "--output", str(exported)]) == 2
    assert "already exists" in capfd.readouterr().err
