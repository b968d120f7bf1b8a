"""--start-from with symbols that the model does not have: old rows stay, new ones are added."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq import ModelConfig, Seq2Seq, TrainingConfig, Vocabulary
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.model.extend import extended

OLD = [("a b", "x y"), ("b a", "y x"), ("a a", "x x"), ("b b", "y y")] * 4
NEW = [("a c", "x z"), ("c a", "z x"), ("c d", "z w"), ("d d", "w w")] * 4
SHAPE = ModelConfig(hidden=16, embedding=8, dropout=0.0)
RECIPE = TrainingConfig(epochs=15, batch_size=2, lr=2e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    seq2seq.fit(OLD, dev=OLD, output=run, model=SHAPE, training=RECIPE, progress=False)
    return run


def first_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-0000000"


def grown(base: Path, run: Path, pairs: list[tuple[str, str]], **options: object) -> Path:
    """Start a run from ``base`` that takes no step, and return its first checkpoint."""
    seq2seq.fit(
        pairs,
        dev=pairs,
        output=run,
        start_from=base,
        training=TrainingConfig(epochs=1, max_steps=1, batch_size=64),
        progress=False,
        **options,  # type: ignore[arg-type]
    )
    return first_checkpoint(run)


def test_old_symbols_keep_their_rows(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = seq2seq.load(base)
    found = grown(base, tmp_path / "run", NEW)
    meta = files.load_metadata(found)
    # The old symbols first, in their order; those that are new by falling count, then by name.
    assert meta["source"] == [*before.source.symbols, "c", "d"]
    assert meta["target"] == [*before.target.symbols, "w", "z"]
    old = before.models[0].state_dict()
    new = files.load_tensors(found, files.MODEL)
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        rows = len(tensor)
        assert torch.equal(new[name][:rows], tensor), name
        added = 2 if name in GROWS else 0
        assert len(new[name]) == rows + added and new[name].isfinite().all()
    mean = old["output.weight"][3:].mean(0), old["output.bias"][3:].mean()
    assert torch.allclose(new["output.weight"][-1], mean[0], atol=1e-6)
    assert torch.allclose(new["output.bias"][-2:], mean[1].expand(2), atol=1e-6)
    assert not torch.equal(*new["source_embedding.weight"][-2:])
    # What it knew it still knows.
    model = seq2seq.load(found)
    assert [model(source).text for source, _ in OLD] == [target for _, target in OLD]
    assert "symbols added" not in capfd.readouterr().err  # progress=False has no notes


GROWS = {"source_embedding.weight", "target_embedding.weight", "output.weight", "output.bias"}


def test_the_new_pairs_are_learned(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = OLD + NEW
    model = seq2seq.fit(pairs, dev=pairs, output=tmp_path / "run", start_from=base, training=RECIPE)
    assert [model(source).text for source, _ in pairs] == [target for _, target in pairs]
    notes = capfd.readouterr().err
    assert "note: 2 new source symbols added to the vocabulary: c d\n" in notes
    assert "note: 2 new target symbols added to the vocabulary: w z\n" in notes
    # The run knows its own vocabulary from now on.
    longer = replace(RECIPE, epochs=16)
    options = {"training": longer, "resume": True, "progress": False}
    again = seq2seq.fit(pairs, dev=pairs, output=tmp_path / "run", **options)
    assert again.source.symbols == model.source.symbols


@pytest.mark.parametrize("count", ["1", "5"])
def test_rare_symbols_stay_unknown(base: Path, tmp_path: Path, count: str) -> None:
    lines = tmp_path / "lines.tsv"
    pairs = [*OLD, *NEW, ("e", "v")]
    lines.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    run = tmp_path / "run"
    start = ["train", "pairs", "--train", str(lines), "--dev", str(lines), "--max-steps", "1"]
    start += ["--start-from", str(base), "--output", str(run), "--min-count", count]
    # With a count of 5, the target of the last pair has no known symbol.
    assert main([*start, "--skip-bad"]) == 0
    known = files.load_metadata(first_checkpoint(run))["source"]
    assert ("e" in known) == (count == "1") and "c" in known


def test_no_new_symbols_change_nothing(base: Path, tmp_path: Path) -> None:
    before = seq2seq.load(base)
    found = grown(base, tmp_path / "run", OLD[:3])
    assert files.load_metadata(found)["source"] == list(before.source.symbols)
    new = files.load_tensors(found, files.MODEL)
    assert all(torch.equal(new[n], t) for n, t in before.models[0].state_dict().items())


def test_wider_and_with_new_symbols(base: Path, tmp_path: Path) -> None:
    """Growing the layers and the vocabularies at once keeps the function of the old symbols."""
    found = grown(base, tmp_path / "run", NEW, model=ModelConfig(hidden=24, embedding=8, dropout=0))
    wide, before = seq2seq.load(found), seq2seq.load(base)
    for source, target in OLD[:4]:
        old, new = before(source), wide(source)
        assert new.text == target
        # Two more symbols share the probability; each has the mean logit.
        assert new.score <= old.score + 1e-5


@pytest.mark.parametrize("tie", ["output", "all"])
def test_tied_embeddings(tmp_path: Path, tie: str) -> None:
    letters = Vocabulary(["<unk>", "a", "b"])
    shape = ModelConfig(hidden=8, embedding=8, tie=tie, dropout=0.0)
    own = tmp_path / "own"
    torch.manual_seed(0)
    model = Seq2Seq(shape, len(letters), len(letters))
    seq2seq.Predictor(model, letters, letters).save(own)
    pairs = [("a c", "a d"), ("b d", "b b")]
    found = grown(own, tmp_path / "run", pairs)
    meta = files.load_metadata(found)
    if tie == "all":  # one vocabulary
        assert meta["source"] == meta["target"] == ["<unk>", "a", "b", "c", "d"]
    else:
        assert (meta["source"][3:], meta["target"][3:]) == (["c", "d"], ["d"])
    new = seq2seq.load(found).models[0]
    assert new.output.weight is new.target_embedding.weight
    assert torch.equal(new.output.weight[:6], model.output.weight)


def test_a_smaller_vocabulary_is_refused() -> None:
    old = Seq2Seq(ModelConfig(hidden=4, embedding=4), 9, 9).state_dict()
    fresh = Seq2Seq(ModelConfig(hidden=4, embedding=4), 9, 8).state_dict()
    with pytest.raises(ValueError, match=r"target_embedding.weight has 9 rows, more than the 8"):
        extended(old, fresh, tied=False)


def test_subwords_and_other_tasks_keep_theirs(tmp_path: Path) -> None:
    lines = tmp_path / "lines.tsv"
    lines.write_text("".join(f"{'ab ba ' * i}\t{'xy yx '}\n" for i in range(1, 20)))
    small = ["--hidden", "8", "--embedding", "8", "--max-steps", "1", "--vocabulary", "20"]
    start, run = tmp_path / "start", tmp_path / "run"
    command = ["train", "translate", "--train", str(lines), "--dev", str(lines)]
    assert main([*command, *small, "--output", str(start)]) == 0
    more = tmp_path / "more.tsv"
    more.write_text(lines.read_text() + "qqq\txy\n" * 5)
    command = ["train", "translate", "--train", str(more), "--dev", str(lines)]
    again = [*small[:-2], "--output", str(run), "--start-from", str(start)]
    assert main([*command, *again]) == 0
    symbols = [
        json.loads((first_checkpoint(path) / files.METADATA).read_text())["source"]
        for path in (start, run)
    ]
    assert symbols[0] == symbols[1]


def test_rare_new_targets_are_trained_on_as_unknown(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As without --start-from; only targets that the whole vocabulary does not know are counted."""
    pairs = tmp_path / "pairs.tsv"
    # "x" is rare in these pairs, but the model knows it; "rare" is known to neither.
    lines = [*(f"{source}\t{target}" for source, target in NEW[1:] * 3), "a\tx", "b\trare"]
    pairs.write_text("".join(f"{line}\n" for line in lines))
    run = tmp_path / "run"
    argv = ["train", "pairs", "--train", str(pairs), "--start-from", str(base), "--output"]
    assert main([*argv, str(run), "--min-count", "14", "--max-steps", "2"]) == 0
    error = capfd.readouterr().err
    assert f"{pairs}: 1 target with only unknown symbols; a smaller --min-count" in error
    assert main(["train", "pairs", "--output", str(run), "--resume", "--max-steps", "3"]) == 0
