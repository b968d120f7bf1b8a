"""The tasks: the SCAN grammar against the paper, reversed numbers, and the user's own pairs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.data.pair_files import PairFile, Reader, frequent
from fused_attn.seq2seq.data.tokenizers import make_tokenizer
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import registry, scan_grammar
from fused_attn.seq2seq.tasks.reverse import Reverse, ReverseConfig
from fused_attn.seq2seq.tasks.scan import Scan, ScanConfig
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig
from fused_attn.seq2seq.vocabulary import Vocabulary

PUBLISHED = Path(__file__).resolve().parents[2] / "shared/data/scan/simple_test_commands.txt"

# Figure 1 of Lake & Baroni 2018, and "around" and "opposite" from its appendix.
EXAMPLES = {
    "jump": "I_JUMP",
    "jump left": "I_TURN_LEFT I_JUMP",
    "jump around right": "I_TURN_RIGHT I_JUMP " * 4,
    "turn left twice": "I_TURN_LEFT I_TURN_LEFT",
    "jump thrice": "I_JUMP I_JUMP I_JUMP",
    "jump opposite left and walk thrice": "I_TURN_LEFT I_TURN_LEFT I_JUMP" + " I_WALK" * 3,
    "jump opposite left after walk around left": "I_TURN_LEFT I_WALK " * 4
    + "I_TURN_LEFT I_TURN_LEFT I_JUMP",
    "turn opposite right": "I_TURN_RIGHT I_TURN_RIGHT",
    "turn around left": "I_TURN_LEFT " * 4,
}


def test_scan_means_what_the_paper_says() -> None:
    meaning = dict(scan_grammar.commands())
    for command, actions in EXAMPLES.items():
        assert meaning[tuple(command.split())] == tuple(actions.split()), command


def test_scan_has_the_published_sizes() -> None:
    every = scan_grammar.commands()
    assert len(every) == len({command for command, _ in every}) == 20_910
    assert len({word for command, _ in every for word in command}) == 13
    assert len({action for _, actions in every for action in actions}) == 6
    assert max(len(actions) for _, actions in every) == 48
    sizes = {
        split: tuple(map(len, scan_grammar.split_commands(split)))
        for split in scan_grammar.SPLITS[1:]
    }
    assert sizes == {
        "length": (16_990, 3_920),
        "turn-left": (21_890, 1_208),
        "jump": (14_670, 7_706),
    }


@pytest.mark.parametrize("split", ["turn-left", "jump"])
def test_scan_trains_on_the_phrase_alone(split: str) -> None:
    train, test = scan_grammar.split_commands(split)
    phrase = " ".join(split.split("-"))
    with_it = Counter(command for command, _ in train if phrase in " ".join(command))
    assert list(with_it) == [tuple(phrase.split())]
    assert with_it.total() == pytest.approx(len(train) / 10, rel=0.01)
    assert all(phrase in " ".join(command) for command, _ in test)
    assert {command for command, _ in train}.isdisjoint(command for command, _ in test)


@pytest.mark.parametrize("split", scan_grammar.SPLITS)
def test_scan_loads(split: str) -> None:
    data = Scan(ScanConfig(split=split)).load()
    train, dev, test = (
        {source for source, _, _ in data.train},
        {item.source for item in data.dev},
        {item.source for item in data.test},
    )
    assert train and dev and test and train.isdisjoint(dev | test)
    if split == "simple":
        assert dev.isdisjoint(test) and len(train | dev | test) == 20_910
        assert len(test) / 20_910 == pytest.approx(0.2, abs=0.02)
    if split in ("turn-left", "jump"):
        assert tuple(split.split("-")) in train
    for source, target, _ in data.train[:50]:
        assert data.source.decode(data.source.encode(source)) == source
        assert data.target.decode(data.target.encode(target)) == target


def test_scan_takes_the_published_test(tmp_path: Path) -> None:
    if not PUBLISHED.exists():
        pytest.skip("the published test commands were not found next to this checkout")
    config = ScanConfig(**Scan.test_option(PUBLISHED))
    data = Scan(config).load()
    assert len(data.test) == 4_182
    assert len(data.train) + len(data.dev) == 16_728
    (tmp_path / "bad").write_text("jump twice\njump sideways\n")
    with pytest.raises(InputError, match="'jump sideways' is not a command of SCAN"):
        Scan(ScanConfig(**Scan.test_option(tmp_path / "bad"))).load()


def test_reverse() -> None:
    data = Reverse(ReverseConfig(numbers=5, pairs=200, longest=6, test_longest=9)).load()
    assert len(data.train) == 200
    assert all(target == source[::-1] for source, target, _ in data.train)
    assert {len(source) for source, _, _ in data.train} == set(range(1, 7))
    assert all(item.references == (item.source[::-1],) for item in (*data.dev, *data.test))
    assert max(len(item.source) for item in data.test) == 9
    again = Reverse(ReverseConfig(numbers=5, pairs=200, longest=6, test_longest=9)).load()
    assert again.fingerprint == data.fingerprint


LINES = [
    "the cat\tle chat",
    "the dog\tle chien",
    "the cat\tun chat",
    "고양이 한 마리\tune chatte",
    "שלום עולם\tbonjour 👋🏽",
]


def write(path: Path, lines: list[str] | bytes) -> Path:
    path.write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode() + b"\n")
    return path


@pytest.mark.parametrize("tokens", ["words", "chars"])
def test_lines_of_any_script_come_back(tmp_path: Path, tokens: str) -> None:
    tokenizer = make_tokenizer(tokens, None)
    file = PairFile(str(write(tmp_path / "a.tsv", LINES)), Reader(tokenizer, tokenizer))
    for _ in range(2):  # it can be read again
        pairs = list(file)
        assert [f"{tokenizer.join(s)}\t{tokenizer.join(t)}" for s, t, _ in pairs] == LINES
        assert file.skipped == 0
    assert pairs[0].source == (("the", "cat") if tokens == "words" else tuple("the▁cat"))


BAD = {
    "empty": (b"", " is empty"),
    "one column": (b"a\tb\nlonely\n", ", line 2: expected a source and a target separated"),
    "four columns": (
        b"a\tb\tc\td\n",
        ", line 1: expected a source, a target and links separated by tabs, got 4 columns",
    ),
    "no link": (b"a\tb\n" + b"a\tb\tc\n", ", line 2: 'c' is not a link"),
    "far link": (b"a\tb\t0-1\n", ", line 1: the link 0-1 is out of range for 1"),
    "unknown": (b"a\tb\na\tz z\n", ", line 2: the target has only unknown symbols"),
    "bytes": (b"a\tb\na\tb\n\xff\xfe\tb\n", ", line 3: not UTF-8 text (byte 1)"),
    "no source": (b" \tb\n", ", line 1: the source is empty"),
    "no target": (b"a\t\n", ", line 1: the target is empty"),
    "long": (
        b"a\tb\n" + b"a " * 6 + b"\tb\n",
        ", line 2: the source has 6 symbols, more than the 5 allowed",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_named(tmp_path: Path, kind: str) -> None:
    """Errors name the file and the line; with skip_bad bad lines are counted instead."""
    content, message = BAD[kind]
    path = write(tmp_path / "a.tsv", content)
    strict = PairFile(str(path), Reader(max_length=5, links=True))
    patient = PairFile(str(path), Reader(max_length=5, links=True, skip_bad=True))
    strict.known = patient.known = {"b"}
    with pytest.raises(InputError) as error:
        list(strict)
    assert str(error.value).startswith(f"{path}{message}")
    assert (" --skip-bad skips such lines" in error.value.on_the_command_line) == bool(content)
    good = content.count(b"a\tb\n")
    if not good:
        reason = "is empty" if kind == "empty" else r"no usable lines \(1 skipped\)"
        with pytest.raises(InputError, match=reason):
            list(patient)
    else:
        assert list(patient) == [(("a",), ("b",), ())] * good
        assert patient.skipped == 1


def test_rare_symbols_are_one() -> None:
    symbols = frequent(Counter("abacba"), min_count=2)
    vocabulary = Vocabulary(symbols)
    assert symbols == ["<unk>", "a", "b"]
    assert vocabulary.decode(vocabulary.encode(["a", "c", "d"])) == ("a", "<unk>", "<unk>")


def test_targets_of_one_source_are_its_references(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.tsv", LINES))
    data = Pairs(PairsConfig(train=path, dev=path, test=path)).load()
    assert data.test[0].references == (("le", "chat"), ("un", "chat"))
    assert len(list(data.train)) == 5 and len(data.test) == 4


def test_train_and_predict_own_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model trained on a file reproduces its lines, in every script; bad lines are counted."""
    file = write(tmp_path / "own.tsv", [*LINES, "no tab here"] * 30)
    output = tmp_path / "run"
    options = ["--hidden", "32", "--embedding", "16", "--epochs", "30", "--batch-size", "16"]
    options += ["--lr", "0.01", "--dropout", "0", "--train", str(file), "--dev", str(file)]
    train = ["train", "pairs", "--output", str(output), *options]
    assert main(train) == 2
    assert f"{file}, line 6: expected a source and a target" in capfd.readouterr().err
    assert main([*train, "--skip-bad"]) == 0
    assert f"note: {file}: skipped 30 bad lines" in capfd.readouterr().err
    assert main(["predict", str(output), "the dog", "고양이 한 마리", "שלום עולם"]) == 0
    assert capfd.readouterr().out.splitlines() == ["le chien", "une chatte", "bonjour 👋🏽"]
    assert main(["predict", str(output), "unheard-of"]) == 0  # all unknown words are one symbol
    capfd.readouterr()
    test = write(tmp_path / "test.tsv", LINES)
    assert main(["evaluate", str(output), "--test", str(test), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["lines wrong"] == 0
    assert "4 of these lines are in the training set of the model" in captured.err
    assert main(["evaluate", str(output)]) == 2
    assert "the model has no test set: name a file with --test" in capfd.readouterr().err


def test_every_task_is_documented_for_the_command_line() -> None:
    from fused_attn.seq2seq.commands.option_help import TASK_HELP, TASK_SUMMARIES

    assert list(TASK_HELP) == list(TASK_SUMMARIES) == list(registry.TASKS)
