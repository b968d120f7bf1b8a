"""Defaults that follow the vocabularies and the number of training pairs."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from fused_attn import seq2seq
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.tasks.defaults import defaults
from fused_attn.seq2seq.tasks.text import Translate

LETTERS, PHONES = 31, 43  # with the four special symbols
CMU_WORDS = 117_000
MODEL, TRAINING = ModelConfig(), TrainingConfig()
COUNTS = sorted({round(10 ** (k / 12)) for k in range(85)})  # 1 to 10 million


def found(
    pairs: int = CMU_WORDS, sizes: tuple[int, int] = (LETTERS, PHONES), given: tuple[str, ...] = ()
) -> tuple[ModelConfig, TrainingConfig, list[str]]:
    return defaults(MODEL, TRAINING, given, pairs, *sizes)


@pytest.mark.parametrize("pairs", [CMU_WORDS, 1_000_000])
def test_letters_and_many_pairs_keep_the_defaults(pairs: int) -> None:
    model, training, notes = found(pairs)
    assert model is MODEL
    assert training is TRAINING
    assert notes == []


@pytest.mark.parametrize("pairs", [500, CMU_WORDS])
def test_letters_keep_the_narrow_embedding(pairs: int) -> None:
    assert found(pairs)[0] == MODEL


@pytest.mark.parametrize("sizes", [(1_100, PHONES), (LETTERS, 1_100)], ids=["source", "target"])
def test_a_large_vocabulary_gets_a_wide_embedding(sizes: tuple[int, int]) -> None:
    model, training, notes = found(sizes=sizes)
    assert asdict(model) == asdict(MODEL) | {"embedding": 256}
    assert training is TRAINING
    side = "source" if sizes[0] == 1_100 else "target"
    assert notes == [f"embedding 256 (1,100 {side} symbols)"]


def test_few_pairs_get_more_epochs_of_smaller_batches() -> None:
    model, training, notes = found(500)
    assert model is MODEL
    assert asdict(training) == asdict(TRAINING) | {"epochs": 80, "batch_size": 32}
    assert notes == ["80 epochs of batches of 32 (500 pairs)"]


def test_eight_thousand_pairs_get_smaller_batches_only() -> None:
    _, training, notes = found(7_840)
    assert asdict(training) == asdict(TRAINING) | {"batch_size": 32}
    assert notes == ["batches of 32 (7,840 pairs)"]


def test_notes_name_only_what_has_changed() -> None:
    assert found(500, given=("epochs",))[2] == ["batches of 32 (500 pairs)"]
    assert found(500, given=("batch_size",))[2] == ["80 epochs (500 pairs)"]
    assert len(found(500, (1_100, 1_100))[2]) == 2


def test_fields_that_are_given_stay() -> None:
    everything = {"embedding": 64, "epochs": 10, "batch_size": 128}
    for name, value in everything.items():
        model, training, notes = found(500, (1_100, PHONES), given=(name,))
        values = asdict(model) | asdict(training)
        assert values[name] == value
        assert not any(values[other] == everything[other] for other in everything.keys() - {name})
        assert len(notes) == (1 if name == "embedding" else 2)
    assert found(500, (1_100, PHONES), tuple(everything)) == (MODEL, TRAINING, [])


def test_the_embedding_grows_with_the_vocabulary() -> None:
    widths = [found(sizes=(size, PHONES))[0].embedding for size in range(1, 3_000)]
    assert all(narrow <= wide for narrow, wide in pairwise(widths))
    assert (widths[0], widths[-1]) == (64, 256)


def test_epochs_fall_and_batches_grow_with_the_pairs() -> None:
    chosen = [found(pairs)[1] for pairs in COUNTS]
    for few, many in pairwise(chosen):
        assert few.epochs >= many.epochs
        assert few.batch_size <= many.batch_size
    assert chosen[0].epochs > chosen[-1].epochs == 10
    assert chosen[0].batch_size < chosen[-1].batch_size == 128


@pytest.mark.parametrize("pairs", [pairs for pairs in COUNTS if pairs < 16_000])
def test_a_run_on_few_pairs_costs_no_more_than_a_few_epochs_on_many(pairs: int) -> None:
    training = found(pairs)[1]
    assert training.epochs <= 100
    assert training.epochs * pairs <= 160_000
    assert training.epochs * math.ceil(pairs / training.batch_size) <= 2_600


def test_what_a_task_sets_is_never_reduced() -> None:
    model = ModelConfig(embedding=384, hidden=512)
    training = TrainingConfig(epochs=200, batch_size=16)
    assert defaults(model, training, (), 500, 20_000, 20_000) == (model, training, [])


def test_translation_keeps_its_batches() -> None:
    few = defaults(Translate.model, Translate.training, (), 500, 8_000, 8_000)
    assert few[0] is Translate.model
    assert few[1].epochs > 12
    assert asdict(few[1]) == asdict(Translate.training) | {"epochs": few[1].epochs}
    many = defaults(Translate.model, Translate.training, (), 31_547, 8_000, 8_000)
    assert many == (Translate.model, Translate.training, [])


@pytest.mark.parametrize("hidden", [24, 64])
def test_the_embedding_of_a_narrow_model_stays(hidden: int) -> None:
    model = ModelConfig(hidden=hidden)
    assert defaults(model, TRAINING, (), CMU_WORDS, 1_100, PHONES)[0] is model


def test_residual_connections_keep_the_widths_they_need() -> None:
    model = ModelConfig(encoder_hidden=32, residual=True)  # memory and embedding both 64 wide
    assert defaults(model, TRAINING, (), CMU_WORDS, 1_100, PHONES)[0] is model


def test_five_pairs_are_learned(tmp_path: Path) -> None:
    """The defaults of the task on five pairs: the model reproduces all of them."""
    pairs = [
        ("hello", "HH AH L OW"),
        ("world", "W ER L D"),
        ("thing", "TH IH NG"),
        ("tree", "T R IY"),
        ("cat", "K AE T"),
    ]
    # Patience saves time: a checkpoint without errors stays the best one.
    shortened = TrainingConfig(patience=20)
    model, training, _ = defaults(MODEL, shortened, (), len(pairs), 18, 20)
    predictor = seq2seq.fit(
        pairs,
        dev=pairs,
        tokens=("chars", "words"),
        output=tmp_path / "run",
        model=model,
        training=training,
        progress=False,
    )
    assert [predictor(source).text for source, _ in pairs] == [target for _, target in pairs]
