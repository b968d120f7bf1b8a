"""Vocabularies, batches, and the pronouncing dictionary with its split."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.data.examples import Examples, epoch_batches, pad
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import cmudict
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD, UnknownSymbolError, Vocabulary

TEST_WORDS = Path(__file__).resolve().parents[2] / "shared/data/g2p/test_words.txt"


@pytest.fixture(scope="module")
def dictionary() -> cmudict.Lexicon:
    return cmudict.load_dictionary()


def test_vocabulary_numbers_and_back() -> None:
    vocabulary = Vocabulary("abc")
    numbers = vocabulary.encode("cab")
    assert not {PAD, BOS, EOS} & set(numbers)
    assert max(numbers) == len(vocabulary) - 1
    assert vocabulary.decode([BOS, *numbers, EOS, PAD]) == ("c", "a", "b")
    with pytest.raises(UnknownSymbolError) as caught:
        vocabulary.encode("cat")
    assert caught.value.symbol == "t"


def test_vocabulary_refuses_doubles() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Vocabulary("aa")


def test_padding() -> None:
    padded, lengths = pad([[5, 6], [], [7, 8, 9]])
    assert padded.tolist() == [[5, 6, PAD], [PAD] * 3, [7, 8, 9]]
    assert lengths.tolist() == [2, 0, 3]


def test_batch_is_cut_to_its_longest() -> None:
    examples = Examples.of([[3], [3, 4], [3] * 9], [[5, 6], [5], [5] * 9])
    batch = examples.batch(torch.tensor([0, 1]))
    assert batch.source.tolist() == [[3, PAD], [3, 4]]
    assert batch.source_lengths.tolist() == [1, 2]
    assert batch.target.tolist() == [[BOS, 5, 6, EOS], [BOS, 5, EOS, PAD]]
    assert batch.tokens == 5


def make_examples(count: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return Examples.of([[3] * n for n in lengths], [[3] * (n % 5 + 1) for n in lengths])


def test_an_epoch_has_every_pair_once_and_hardly_pads() -> None:
    examples = make_examples(1000)
    batches = epoch_batches(examples, TrainingConfig(batch_size=16), 0)
    assert torch.cat(batches).sort().values.tolist() == list(range(1000))
    assert all(len(rows) == 16 for rows in batches) or sum(len(r) < 16 for r in batches) == 1
    mixed = [rows for rows in batches if len(examples.source_lengths[rows].unique()) > 1]
    assert len(mixed) * 16 < 11 * 16  # each length leaves over less than one batch


def test_targets_of_a_batch_are_of_mixed_lengths() -> None:
    """Target lengths vary within a batch as among all pairs with the same source length."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(1, 9, (640,), generator=generator).tolist()
    examples = Examples.of([[3] * 5] * 640, [[3] * n for n in targets])
    batches = epoch_batches(examples, TrainingConfig(batch_size=32), 0)
    assert len(batches) == 20
    lengths = torch.stack([examples.target_lengths[rows] for rows in batches]).double()
    assert lengths.var(dim=1).mean() > 0.9 * lengths.var()
    assert lengths.mean(dim=1).var() < 3 * lengths.var() / 32


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    examples = make_examples(100)

    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(
            epoch_batches(examples, TrainingConfig(batch_size=8, seed=seed), epoch)
        ).tolist()

    torch.manual_seed(5)
    first = order(1, 0)
    torch.manual_seed(6)
    assert order(1, 0) == first
    assert order(1, 1) != first
    assert order(2, 0) != first


def test_parsing() -> None:
    lexicon = cmudict.parse_dictionary(
        [
            "read R EH1 D # past",
            "read(2) R IY1 D",
            "read(3) R IY0 D",  # without stress, the same as the second
            "o'clock AH0 K L AA1 K",
            "a.m. EY2 EH1 M",  # not plain
            "3d TH R IY1 D IY2",
            "",
            "# a comment",
        ]
    )
    assert lexicon == {
        "read": (("R", "EH", "D"), ("R", "IY", "D")),
        "o'clock": (("AH", "K", "L", "AA", "K"),),
    }


def test_the_dictionary(dictionary: cmudict.Lexicon) -> None:
    assert len(dictionary) > 120_000
    assert len(cmudict.phones(dictionary)) == 39
    assert set(cmudict.phones(dictionary)) == cmudict.PHONES
    assert dictionary["hello"] == (("HH", "AH", "L", "OW"), ("HH", "EH", "L", "OW"))
    assert set("".join(dictionary)) == set(cmudict.LETTERS)


def test_a_missing_dictionary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(InputError, match=r"pip install 'fused-attn\[seq2seq\]'"):
        cmudict.load_dictionary()


def test_split_is_by_word_complete_and_stable(dictionary: cmudict.Lexicon) -> None:
    split = cmudict.split_words(dictionary)
    parts = [set(part) for part in (split.train, split.dev, split.test)]
    assert set.union(*parts) == dictionary.keys()
    assert sum(map(len, parts)) == len(dictionary)
    assert len(split.test) / len(dictionary) == pytest.approx(0.05, rel=0.05)
    assert len(split.dev) / len(dictionary) == pytest.approx(0.02, rel=0.05)
    # Fixed forever: the test words of a trained model must not change.
    assert split.test[:4] == ("'round", "abandonments", "abbe", "abdallah")
    # In a smaller dictionary, in any order, each word stays in its set.
    fewer = dict(sorted(dictionary.items(), reverse=True)[::2])
    assert set(cmudict.split_words(fewer).test) == parts[2] & fewer.keys()


def test_given_test_words_are_the_test(dictionary: cmudict.Lexicon) -> None:
    words = ["hello", "world", "nosuchword"]
    split = cmudict.split_words(dictionary, words)
    assert split.test == ("hello", "world")
    assert len(split.train) + len(split.dev) + 2 == len(dictionary)
    assert not {"hello", "world"} & {*split.train, *split.dev}


def test_limit_takes_fewer_words_and_keeps_the_test(dictionary: cmudict.Lexicon) -> None:
    whole, limited = cmudict.split_words(dictionary), cmudict.split_words(dictionary, limit=500)
    assert len(limited.train) + len(limited.dev) == 500
    assert limited.test == whole.test
    assert set(limited.train) < set(whole.train) and set(limited.dev) < set(whole.dev)


def test_splits_that_cannot_be() -> None:
    lexicon = {"a": (("AH",),)}
    with pytest.raises(InputError, match="none of the test words"):
        cmudict.split_words(lexicon, ["b"])
    with pytest.raises(InputError, match="too few"):
        cmudict.split_words(lexicon, ["a"])


def test_the_published_test_words_are_all_known(dictionary: cmudict.Lexicon) -> None:
    if not TEST_WORDS.exists():
        pytest.skip("the published test words were not found next to this checkout")
    split = cmudict.split_words(dictionary, cmudict.read_test(TEST_WORDS))
    assert len(split.test) == 11_994
