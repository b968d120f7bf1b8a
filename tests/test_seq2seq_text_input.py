"""Texts as people have them: Unicode forms, encodings, line ends, reserved words."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pairs import Data
from fused_attn.seq2seq.data.texts import cleaned
from fused_attn.seq2seq.data.tokenizers import Subwords
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig
from fused_attn.seq2seq.tasks.g2p import G2P, G2PConfig
from fused_attn.seq2seq.tasks.registry import TASKS, make_task
from fused_attn.seq2seq.tasks.reverse import Reverse, ReverseConfig
from fused_attn.seq2seq.tasks.scan import Scan, ScanConfig
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig

BOM = "\ufeff"
COMPOSED, DECOMPOSED = "café 각", "cafe\u0301 \u1100\u1161\u11a8"
TINY = ["--hidden", "8", "--embedding", "8", "--max-steps", "2"]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def load(path: str, **options: object) -> Data:
    return Pairs(PairsConfig(train=path, **options)).load()  # type: ignore[arg-type]


def texts(data: Data) -> list[str]:
    return [f"{' '.join(source)}|{' '.join(target)}" for source, target, _ in data.train]


# --- normalization


@pytest.mark.parametrize("tokens", ["words", "chars", "subwords"])
def test_both_forms_of_a_letter_are_one_text(tmp_path: Path, tokens: str) -> None:
    assert COMPOSED != DECOMPOSED == unicodedata.normalize("NFD", COMPOSED)
    path = write(tmp_path / "a.tsv", f"{DECOMPOSED}\t{COMPOSED}\n{COMPOSED}\t{DECOMPOSED}\n" * 20)
    task = Pairs(PairsConfig(train=path, tokens=tokens, vocabulary=18))
    data = task.load()
    assert len(set(data.train)) == 1
    assert not {"e\u0301", "\u0301", "\u1161"} & {*data.source.symbols, *data.target.symbols}
    for text in (COMPOSED, DECOMPOSED, BOM + DECOMPOSED):
        assert task.read(text) == task.read(COMPOSED)
        assert task.read_target(text) == task.read_target(COMPOSED)
        assert task.write(task.read_target(text)) == COMPOSED
    assert task.to_json()["normalization"] == "NFC"


def test_a_model_predicts_the_same_for_both_forms(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Vocabulary, targets and predictions are in NFC, from a file in NFD that begins with a BOM."""
    lines = f"{DECOMPOSED}\te\u0301te\u0301\nthe\tle\n" * 40
    path, run = write(tmp_path / "a.tsv", BOM + lines), tmp_path / "run"
    argv = f"train pairs --train {path} --dev {path} --output {run} --hidden 16 --embedding 16"
    assert main([*argv.split(), "--epochs", "15", "--lr", "0.02", "--dropout", "0"]) == 0
    capfd.readouterr()
    assert main(["predict", str(run), COMPOSED, DECOMPOSED, BOM + COMPOSED, "the"]) == 0
    assert capfd.readouterr().out.splitlines() == ["été", "été", "été", "le"]
    model = seq2seq.load(run)
    assert model(DECOMPOSED).text == "été"
    assert model([["cafe\u0301"]])[0].source == ("cafe\u0301",)  # tokens are symbols
    assert "cafe\u0301" not in model.source.symbols and "café" in model.source.symbols
    write(tmp_path / "test.tsv", f"{BOM}{DECOMPOSED}\t{BOM}e\u0301te\u0301\n")
    assert seq2seq.evaluate(model, tmp_path / "test.tsv")["lines wrong"] == 0
    assert seq2seq.evaluate(model, [(DECOMPOSED, "e\u0301te\u0301")])["lines wrong"] == 0


def test_pairs_in_python_are_normalized_and_tokens_are_not() -> None:
    task = Pairs(PairsConfig())
    task.given = {"train": [(DECOMPOSED, BOM + DECOMPOSED), (["e\u0301", BOM], ["e\u0301"])]}
    first, second = task.load().train
    assert first == (tuple(COMPOSED.split()), tuple(COMPOSED.split()), ())
    assert second == (("e\u0301", BOM), ("e\u0301",), ())


def test_dialogs_lexicons_and_word_lists_are_normalized(tmp_path: Path) -> None:
    dialogs = write(tmp_path / "d.txt", f"{BOM}{DECOMPOSED}\nhi\n\n{BOM}a\nb\u2028c\n")
    config = ChatConfig(dialogs=dialogs, tokens="words")
    pairs = list(Chat(config).load().train)
    assert [pair[:2] for pair in pairs] == [
        (tuple(COMPOSED.split()), ("hi",)), (("a",), ("b", "c"))
    ]  # fmt: skip
    lexicon = write(tmp_path / "l.dict", f"{BOM}zorble Z AO R\r{BOM}quux K W\r\n")
    found = list(G2P(G2PConfig(lexicon=lexicon, limit_words=200)).load().train)[-2:]
    assert ["".join(pair.source) for pair in found] == ["zorble", "quux"]
    words = write(tmp_path / "w.txt", f"{BOM}hello\rworld\r\n{BOM}cat\n")
    assert G2P.test_option(Path(words)) == {"test_words": ("cat", "hello", "world")}
    commands = write(tmp_path / "c.txt", f"{BOM}jump twice\rwalk\n")
    assert Scan.test_option(Path(commands)) == {"test_commands": ("jump twice", "walk")}


def test_every_task_reads_a_text_without_its_byte_order_mark() -> None:
    assert G2P(G2PConfig()).read(f"{BOM}Hello\n") == tuple("hello")
    assert Scan(ScanConfig()).read(f"{BOM}jump twice") == ("jump", "twice")
    assert Reverse(ReverseConfig()).read(f"{BOM}1 2") == ("1", "2")
    assert Reverse(ReverseConfig()).read_target(f"{BOM}cafe\u0301") == ("café",)


def test_a_model_of_an_earlier_version_reads_as_it_did() -> None:
    """Its checkpoint has no field for the form: what was in the vocabulary must stay known."""
    for name in ("pairs", "chat"):
        task = make_task({"name": name, "tokens": "words"})
        assert task.read(BOM + DECOMPOSED) == tuple((BOM + DECOMPOSED).split())
        assert task.read("\u200b") == ("\u200b",)
        assert make_task(json.loads(json.dumps(task.to_json()))).read("e\u0301") == ("e\u0301",)
    for name, kind in TASKS.items():
        new = kind(kind.kind())
        values = new.to_json()
        assert make_task(values).config == new.config, name
    with pytest.raises(ValueError, match=r"normalization must be one of NFC, .*, got 'nfc'"):
        PairsConfig(normalization="nfc")


@pytest.mark.parametrize("field", ["train", "dev", "test", "dialogs", "lexicon", "corpus"])
def test_a_path_of_another_type_is_refused(field: str) -> None:
    """So a checkpoint with one is reported as damaged."""
    kinds = [kind.kind for kind in TASKS.values() if hasattr(kind.kind, field)]
    assert kinds
    for kind in kinds:
        for value in (3, ["x"], {}, True):
            with pytest.raises(ValueError, match=f"^{field} must be"):
                kind(**{field: value})


# --- lines and encodings

LINES = ["a b\tA", "c\tC", "d\tD D"]
ENDS = {
    "lf": "\n".join(LINES) + "\n",
    "crlf": "\r\n".join(LINES) + "\r\n",
    "cr": "\r".join(LINES) + "\r",
    "cr without the last": "\r".join(LINES),
    "mixed": f"{LINES[0]}\r{LINES[1]}\r\n{LINES[2]}\n",
    "mixed the other way": f"{LINES[0]}\n{LINES[1]}\r{LINES[2]}",
    "every line with a mark": "".join(f"{BOM}{line}\n" for line in LINES),
    "a mark": BOM + "\n".join(LINES),
}


@pytest.mark.parametrize("kind", ENDS)
def test_lines_end_as_on_any_system(tmp_path: Path, kind: str) -> None:
    found = texts(load(write(tmp_path / "a.tsv", ENDS[kind])))
    assert found == ["a b|A", "c|C", "d|D D"]


def test_two_files_may_end_lines_differently(tmp_path: Path) -> None:
    first = write(tmp_path / "a", f"{BOM}a b\r\nc\r\nd\r\n")
    second = write(tmp_path / "b", f"{BOM}A\rC\rD D\r")
    assert texts(load(f"{first},{second}")) == ["a b|A", "c|C", "d|D D"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_other_separators_do_not_end_a_line(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path / "a.tsv", f"a{mark}b\tA{mark}B\nc\tC\n")
    assert texts(load(path)) == ["a b|A B", "c|C"]
    dialogs = write(tmp_path / "d.txt", f"hi{mark}there\nyou\n")
    (pair,) = Chat(ChatConfig(dialogs=dialogs, tokens="words")).load().train
    assert pair[:2] == (("hi", "there"), ("you",))


ENCODINGS = {
    "utf-16": ("utf-16", 1, "UTF-16; convert the file: iconv -f UTF-16 -t UTF-8"),
    "big endian": ("utf-16-be", 1, "NUL character (byte 1)", "iconv -f UTF-16BE -t UTF-8"),
    "little endian": ("utf-16-le", 1, "NUL character (byte 2)", "iconv -f UTF-16LE -t UTF-8"),
    "utf-32": ("utf-32", 1, "UTF-32; convert the file: iconv -f UTF-32 -t UTF-8"),
    "latin-1": ("latin-1", 3, "not UTF-8 text (byte 4)", "iconv -f LATIN1 -t UTF-8", "'café\\tT'"),
}


@pytest.mark.parametrize("kind", ENCODINGS)
def test_another_encoding_is_named_with_what_converts_it(tmp_path: Path, kind: str) -> None:
    encoding, line, *parts = ENCODINGS[kind]
    path = write(tmp_path / "a.tsv", "a\tA\nb\tB\ncafé\tT\n".encode(encoding))
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ") and "\n" not in message
    assert all(part in message for part in parts)
    lexicon = write(tmp_path / "l.dict", "cat K AE T\nhi HH AY\ncafé K AE\n".encode(encoding))
    with pytest.raises(InputError, match=re.escape(f"{lexicon}, line {line}: ")) as caught:
        G2P(G2PConfig(lexicon=lexicon, limit_words=200)).load()
    assert parts[0].partition(" (")[0] in str(caught.value)


def test_the_file_of_two_in_another_encoding_is_named(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "a\nb\n"), write(tmp_path / "b", b"A\n\xe9t\xe9\n")
    with pytest.raises(InputError, match=f"line 2: in {second}: not UTF-8 text .byte 1."):
        load(f"{first},{second}")
    assert texts(load(f"{first},{second}", skip_bad=True)) == ["a|A"]


INVISIBLE = {"spaces": " ", "no-break": "\xa0", "zero width": "\u200b", "control": "\x01\x7f"}


@pytest.mark.parametrize("kind", INVISIBLE)
def test_what_cannot_be_seen_is_blank(tmp_path: Path, kind: str) -> None:
    text = INVISIBLE[kind]
    assert cleaned(text) == ""
    for line, reason in (
        (text, "the line is blank"),
        (f"{text}\tB", "the source is empty"),
        (f"b\t{text}", "the target is empty"),
    ):
        path = write(tmp_path / "a.tsv", f"a\tA\n{line}\n")
        with pytest.raises(InputError, match=f"line 2: {reason}; skip_bad skips such lines$"):
            load(path)
        data = load(path, skip_bad=True)
        assert texts(data) == ["a|A"]
        assert f"{path}: skipped 1 bad line" in data.notes
    assert Pairs(PairsConfig(tokens="chars")).read(text) == ()


def test_visible_characters_of_every_kind_stay() -> None:
    for text in ("\ue000", "👩\u200d🚀", "a\u200bb", "\u0301", "\u0378"):
        assert cleaned(text) == text


# --- reserved words


@pytest.mark.parametrize("tokens", ["words", "chars", "subwords"])
def test_reserved_words_are_words(
    tmp_path: Path, tokens: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """<unk> is the unknown symbol; the others mean nothing special."""
    lines = "<unk> the cat\tle <unk>\n<unk>\t<unk>\n<s> </s>\t<pad> <s>\n▁ a\ta ▁\n" * 12
    path, run = write(tmp_path / "a.tsv", lines), tmp_path / "run"
    argv = f"train pairs --train {path} --tokens {tokens} --output {run}"
    size = ["--vocabulary", "30"] if tokens == "subwords" else []
    assert main([*argv.split(), *TINY, *size]) == 0
    capfd.readouterr()
    assert main(["predict", str(run), "<unk>", "the <unk> <s>", "▁ a", "<pad>"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 4
    model = seq2seq.load(run)
    for vocabulary in (model.source, model.target):
        assert vocabulary.symbols.count("<unk>") == 1 and vocabulary.symbols[0] == "<unk>"
    assert model.encode(["<unk>"]) == model.encode(["never seen"])
    assert main(["evaluate", str(run), "--test", path]) == 0


def test_unknown_symbols_may_be_given_as_tokens(tmp_path: Path) -> None:
    pairs = [(["<unk>", "a"], ["b", "<unk>"]), (["<unk>"], ["<unk>"]), ("<unk> a", "<unk>")] * 4
    shape, recipe = ModelConfig(hidden=8, embedding=8), TrainingConfig(max_steps=2)
    model = seq2seq.fit(
        pairs, output=tmp_path / "run", model=shape, training=recipe, progress=False
    )
    assert model.source.symbols == ("<unk>", "a") and model.target.symbols == ("<unk>", "b")
    assert model.encode(["<unk>", "a"]) == model.encode(["z", "a"])


def test_half_of_a_surrogate_pair_is_refused() -> None:
    task = Pairs(PairsConfig())
    for entry in (("a\ud83d", "b"), (["a"], ["\udc00"])):
        task.given = {"train": [("a", "b"), entry]}
        with pytest.raises(InputError, match=r"pair 2: the .* has half of a surrogate pair"):
            task.load()


def test_a_damaged_subword_model_is_reported() -> None:
    for model in ("", "AAAA", "not base64!", "é"):
        with pytest.raises(InputError, match="subword model"):
            Subwords(model).split("a")
    with pytest.raises(InputError, match="no subword model"):
        make_task({"name": "pairs", "tokens": "subwords"}).read("a")
