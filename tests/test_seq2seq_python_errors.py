"""What the Python interface of the toolkit says of what it cannot use."""

from __future__ import annotations

import pickle
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq import (
    InputError,
    ModelConfig,
    Predictor,
    SearchConfig,
    Seq2Seq,
    TrainingConfig,
    Vocabulary,
)
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig

SHAPE = ModelConfig(hidden=8, embedding=8)
RECIPE = TrainingConfig(epochs=1, batch_size=8)
PAIRS = [
    (word, " ".join(word.upper())) for word in ("ab", "ba", "abc", "cab", "bca", "b", "c", "ac")
]


@pytest.fixture(scope="module")
def model() -> Predictor:
    return seq2seq.load("g2p", device="cpu")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("fitted") / "run"
    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE, "device": "cpu"}
    seq2seq.fit(PAIRS, dev=PAIRS[:2], output=run, progress=False, **options)
    return run


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "A"), ("b", "")], r"pairs, pair 2: the target is empty, in \('b', ''\)"),
        ([("a", "A"), ("b",)], r"pairs, pair 2: expected a source and a target, got \('b',\)"),
        (["ab"], "pairs, pair 1: expected a source and a target, got 'ab'"),
        ([("a", 3)], "pairs, pair 1: the target must be a str or a sequence of str, got 3"),
        ([(["a", ""], "A")], "pairs, pair 1: the source has an empty token, in "),
        ([("a", "A"), (["a"], ["", "A"])], "pairs, pair 2: the target has an empty token, in "),
        ([("a" * 300, "A")], "the source has 300 symbols, more than the 200"),
        ([], "pairs is empty"),
        (7, "pairs must be an iterable of pairs or the path of a file, got int"),
        ("nowhere.tsv", "cannot read nowhere.tsv: No such file"),
    ],
    ids=str,
)
def test_fit_refuses(pairs: object, message: str, tmp_path: Path) -> None:
    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE}
    with pytest.raises(InputError, match=message):
        seq2seq.fit(pairs, output=tmp_path / "run", progress=False, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_fit_refuses_options(tmp_path: Path, fitted: Path) -> None:
    pairs = PAIRS
    for options, message in (
        ({"task": "g2p"}, "task must be pairs or translate, got 'g2p'"),
        ({"tokens": "letters"}, "tokens must be one of words, chars, subwords, got 'letters'"),
        ({"tokens": ("chars", "phones")}, "target_tokens must be one of words"),
        ({"start_from": "g2p"}, "start_from: .* has the task g2p, expected pairs"),
        ({"start_from": fitted, "model": ModelConfig(hidden=8)}, "has another shape"),
        ({"training": TrainingConfig(rdrop=1.0), "model": ModelConfig(dropout=0.0)}, "rdrop needs"),
        ({"device": "tpu"}, "device must be"),
        ({"resume": True}, "nothing to resume"),
        ({"min_count": 0}, "min_count must be positive"),
        ({"min_count": "3"}, "^min_count must be int, got str"),
        ({"skip_bad": "no"}, "^skip_bad must be bool, got str"),
        ({"tokens": "subwords", "vocabulary": 9.5}, "^vocabulary must be int.*, got float"),
        ({"training": TrainingConfig(bucket=0)}, "^bucket must be bool, got int"),  # type: ignore[arg-type]
        ({"training": TrainingConfig(seed=1.5)}, "^seed must be int, got float"),  # type: ignore[arg-type]
        ({"model": ModelConfig(residual="no")}, "^residual must be bool, got str"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            seq2seq.fit(pairs, output=tmp_path / "run", progress=False, **options)
        assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="depth"):
        seq2seq.fit(pairs, output=tmp_path / "run", progress=False, depth=3)


class Column:
    """Like a column of a table: a length, an order, and not a list."""

    def __len__(self) -> int:
        return 2

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(["hello", "world"])

    def __getitem__(self, index: int) -> str:
        return ["hello", "world"][index]


def test_what_has_a_length_gives_a_list(model: Predictor) -> None:
    expected = model(["hello", "world"])
    for texts in (Column(), {"a": "hello", "b": "world"}.values(), ("hello", "world")):
        assert model(texts) == expected
    for texts in ({"hello": 1}, {"hello"}, b"hello", None):
        with pytest.raises(InputError, match=f"or an iterator, got {type(texts).__name__}"):
            model(texts)  # type: ignore[call-overload]
    for source, message in (
        ([1, 2], r"\[1, 2\]: token 1 is not a str but int"),
        (["a", None], "token 2 is not a str but NoneType"),
        (b"ab", "expected a text or a sequence of tokens, got bytes"),
        ({"a"}, "expected a text or a sequence of tokens, got set"),
    ):
        with pytest.raises(InputError, match=message):
            model([source])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.5}, InputError, "^temperature has no effect without sample$"),
        ({"seed": 3}, InputError, "seed has no effect without sample"),
        ({"top_k": 3}, InputError, "top_k has no effect without sample"),
        ({"alpha": 0.5, "beam": 3}, InputError, "no effect without length_penalty gnmt"),
        ({"num_beams": 5}, TypeError, "unknown search option 'num_beams', expected one of beam,"),
        ({"beam": True}, ValueError, "beam must be a positive whole number, got True"),
        ({"batch_size": "8"}, ValueError, "batch_size must be a positive int, got '8'"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be a positive int, got 2.5"),
        ({"alignments": "a.png"}, TypeError, "alignments must be True or False, got 'a.png'"),
    ],
    ids=str,
)
def test_search_options(
    options: dict[str, object], error: type[Exception], message: str, model: Predictor
) -> None:
    with pytest.raises(error, match=message):
        model("hello", **options)
    if not {"batch_size", "alignments"} & options.keys():
        with pytest.raises(error, match=message):
            seq2seq.evaluate(model, [("hello", "HH")], **options)


def test_values_that_ask_for_nothing_are_allowed(model: Predictor) -> None:
    assert model("hello", top_k=0, top_p=1.0, coverage_penalty=0.0, nbest=1) == model("hello")


def test_types_of_arguments(model: Predictor, tmp_path: Path) -> None:
    for wrong in (None, ["g2p"], 3):
        with pytest.raises(InputError, match="expected the name or the path of a model, got"):
            seq2seq.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or cuda:N, got 'None'"):
        seq2seq.load("g2p", device=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no checkpoint at nowhere: .*\(bundled models: g2p\)"):
        seq2seq.load("nowhere")
    with pytest.raises(TypeError, match="predictor must be from load or fit, got str"):
        seq2seq.evaluate("g2p", [])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected pairs or the path of a file, got NoneType"):
        seq2seq.evaluate(model, None)  # type: ignore[arg-type]
    for pair, message in (
        (("a", ""), "pair 1: the target is empty"),
        (("", "AH"), "pair 1: the source is empty"),
        (("a", 3), r"pair 1: expected a source and a target, got \('a', 3\)"),
        (3, "pair 1: expected a source and a target, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            seq2seq.evaluate(model, [pair])  # type: ignore[list-item]
    words = Vocabulary("abc")
    with pytest.raises(TypeError, match="source_size must be the size of a vocabulary, an int"):
        Seq2Seq(ModelConfig(), words, words)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="models must be one or several Seq2Seq, got ModelConfig"):
        Predictor(ModelConfig(), words, words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="models must have one model at least"):
        Predictor([], words, words)
    with pytest.raises(ValueError, match="precision must be one of '32', 'bf16', '16', got 16"):
        TrainingConfig(precision=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beam must be a positive whole number, got 0"):
        SearchConfig(beam=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": {"width": 3}}, InputError, "model has no field 'width'; there are cell, hidden"),
        ({"model": {"hidden": 0}}, InputError, "hidden must be a positive whole number, got 0"),
        ({"training": "fast"}, InputError, "training must be a TrainingConfig or a mapping"),
        ({"tokens": ("chars",)}, InputError, r"tokens must be one of words, .* \('chars',\)"),
        ({"tokens": 3}, InputError, "tokens must be one of words, chars, subwords, or two .* 3"),
        ({"vocabulary": 100}, InputError, "vocabulary has no effect without tokens subwords"),
        ({"epochs": 3}, TypeError, r"it belongs in training=TrainingConfig\(epochs=...\)"),
        ({"hidden": 3}, TypeError, r"it belongs in model=ModelConfig\(hidden=...\)"),
        ({"colour": 3}, TypeError, "'colour': those of data are min_count, max_length,"),
        ({"teachers": "nowhere"}, InputError, "no checkpoint at nowhere"),
        ({"output": ""}, InputError, "output must be the path of a directory, got ''"),
        ({"output": None}, InputError, "output must be the path of a directory, got None"),
    ],
    ids=str,
)
def test_arguments_of_fit(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        seq2seq.fit(PAIRS, **{"output": tmp_path / "run", "progress": False} | options)
    assert not list(tmp_path.rglob("checkpoints"))


def test_the_output_of_fit(tmp_path: Path, fitted: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"output must be a directory, and .*file is a file"):
        seq2seq.fit(PAIRS, output=tmp_path / "file", progress=False)
    with pytest.raises(InputError, match=r"is not an empty directory$"):
        seq2seq.fit(PAIRS, output=tmp_path, progress=False)
    with pytest.raises(InputError, match="to resume the run in it, pass resume=True"):
        seq2seq.fit(PAIRS, output=fitted, progress=False)
    for options, name in (
        ({"model": replace(SHAPE, hidden=16)}, "hidden"),
        ({"training": replace(RECIPE, seed=6)}, "seed"),
        ({"tokens": "chars"}, "tokens"),
        ({"min_count": 2}, "min_count"),
    ):
        with pytest.raises(InputError, match=f"^{name} is not that of the run in .*start_from"):
            seq2seq.fit(PAIRS, dev=PAIRS[:2], output=fitted, resume=True, progress=False, **options)
    same = {"model": SHAPE, "training": RECIPE, "tokens": ("chars", "words")}
    again = seq2seq.fit(PAIRS, dev=PAIRS[:2], output=fitted, resume=True, progress=False, **same)
    assert again("ab") == seq2seq.load(fitted)("ab")


def test_held_out_pairs_may_have_symbols_of_their_own(tmp_path: Path) -> None:
    """Every word has a symbol that no other has; those that are held out do not stop it."""
    pairs = [(f"w{i}", f"v{i}") for i in range(1500)]
    options = {"training": RECIPE, "model": SHAPE, "progress": False}
    found = seq2seq.fit(pairs, output=tmp_path / "run", **options)
    assert 1350 < len(found.target.symbols) - 1 < 1500  # some are held out
    held_out = {f"v{i}" for i in range(1500)} - set(found.target.symbols)
    assert 0 < len(held_out) < 150
    lines = tmp_path / "lines.tsv"
    lines.write_text("a\tA\n\nb\tB\n")
    with pytest.raises(InputError, match="line 2: the line is blank"):
        seq2seq.fit(lines, output=tmp_path / "blank", **options)


def test_a_directory_of_that_name_does_not_hide_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g2p").mkdir()
    monkeypatch.chdir(tmp_path)
    assert seq2seq.load("g2p")("hello").text == "HH EH L OW"


def test_a_resumed_fit_refuses_what_it_was_not_started_with(tmp_path: Path, fitted: Path) -> None:
    lines = tmp_path / "lines.tsv"
    lines.write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    again = {"output": fitted, "resume": True, "progress": False}
    for options, message in (
        ({"task": "translate"}, "^task is not that of the run in"),
        ({"start_from": "g2p"}, "^start_from is not that of"),
        ({"teachers": ["g2p"]}, "^teachers is not that of"),
        ({"dev": PAIRS[2:4]}, "trained on other data|training pairs have changed"),
        ({"dev": lines}, "^dev of the run in .* were given in Python: give the same ones"),
    ):
        with pytest.raises(InputError, match=message):
            seq2seq.fit(PAIRS, **{"dev": PAIRS[:2]} | again | options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^pairs of the run in .* were given in Python"):
        seq2seq.fit(lines, dev=PAIRS[:2], **again)  # type: ignore[arg-type]
    run = tmp_path / "file"
    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE}
    seq2seq.fit(lines, output=run, progress=False, **options)
    with pytest.raises(InputError, match=r"^pairs of the run in .* are those of the file .*lines"):
        seq2seq.fit(PAIRS, output=run, resume=True, progress=False)
    assert seq2seq.fit(lines, output=run, resume=True, progress=False)("ab").text


def test_nothing_is_left_of_a_start_that_fails(tmp_path: Path, fitted: Path) -> None:
    def fails(message: str, training: TrainingConfig = RECIPE, **options: object) -> None:
        for run in (tmp_path / "new", empty):
            with pytest.raises(InputError, match=message):
                seq2seq.fit(PAIRS, output=run, training=training, progress=False, **options)
        assert sorted(tmp_path.iterdir()) == [empty] and not list(empty.iterdir())

    empty = tmp_path / "empty"
    empty.mkdir()
    fails(
        "teacher: the source vocabulary of .* differs from that of the data",
        on_disk=True,
        teachers=["g2p"],
    )
    fails("guided needs alignment links", TrainingConfig(guided=1.0), on_disk=True)
    none = ModelConfig(score="none")
    fails(
        "coverage_loss needs a score other than none", TrainingConfig(coverage_loss=1), model=none
    )
    location = ModelConfig(hidden=8, score="location", max_source=2)
    fails("max_source is 2, and a source has 3 symbols", model=location, tokens="chars")


def test_a_model_of_ones_own_goes_everywhere(tmp_path: Path) -> None:
    """What `Predictor.save` wrote, without a training of ours, starts one, and is exported."""
    letters = Vocabulary("abc")
    own = tmp_path / "own"
    Predictor(Seq2Seq(SHAPE, len(letters), len(letters)), letters, letters).save(own)
    pairs = [(source, source[::-1]) for source in ("a b c", "c a", "b b", "a c")] * 3
    options = {"training": RECIPE, "progress": False, "start_from": own}
    found = seq2seq.fit(pairs, dev=pairs[:1], output=tmp_path / "run", **options)
    assert found.source.symbols == letters.symbols
    arguments = ["export", str(own), "--average", str(own), "--output", str(tmp_path / "mean")]
    assert main(arguments) == 0
    assert seq2seq.load(tmp_path / "mean")("a b") == seq2seq.load(own)("a b")


def test_predictions_stand_alone(model: Predictor) -> None:
    many = model(["hello"] * 64, beam=3, nbest=3)
    assert len(pickle.dumps(many[0])) < 4 * len(pickle.dumps(model("hello")))
    alignment = many[0].alignment
    assert alignment is not None
    alignment += 1.0  # an ordinary tensor
    weight = torch.ones(alignment.shape[1], requires_grad=True)
    (alignment @ weight).sum().backward()


def test_loading_draws_nothing(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = seq2seq.load("g2p")
    Predictor.load("g2p")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.isfinite(p).all() for p in first.models[0].parameters())


def test_perplexity_without_dropout(tmp_path: Path) -> None:
    letters = Vocabulary("ab")
    torch.manual_seed(0)
    network = Seq2Seq(ModelConfig(hidden=8, embedding=8, dropout=0.5), len(letters), len(letters))
    task = Chat(ChatConfig(tokens="words"))
    chat = Predictor(network.train(), letters, letters, task=task)
    pairs = [("a b", "b a"), ("b", "a")]
    assert seq2seq.evaluate(chat, pairs) == seq2seq.evaluate(chat, pairs)
    assert network.training


def test_prefixes_and_data_sets(model: Predictor, tmp_path: Path) -> None:
    assert model.predict(["hello"], prefixes=[[]])[0].tokens == model("hello").tokens
    with pytest.raises(ValueError, match="expected 2 prefixes, one per source, got 1"):
        model.predict(["a", "b"], prefixes=[["AH"]])
    with pytest.raises(InputError, match="pair 1: expected a source and a target, got 'ab'"):
        seq2seq.evaluate(model, ["ab", "cd"])  # type: ignore[list-item]
    none = Seq2Seq(ModelConfig(hidden=8, score="none"), 5, 5)
    silent = Predictor(none, Vocabulary("ab"), Vocabulary("ab"))
    with pytest.raises(InputError, match="coverage_penalty has no effect: the model has no"):
        silent("a", beam=2, coverage_penalty=1.0)
    assert silent("a").alignment is None

    class Endless:
        """A map-style data set whose elements never end."""

        def __len__(self) -> int:
            return len(PAIRS)

        def __getitem__(self, index: int) -> tuple[str, str]:
            return PAIRS[index % len(PAIRS)]

    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE}
    with torch.no_grad(), torch.inference_mode():
        run = tmp_path / "run"
        seq2seq.fit(Endless(), dev=PAIRS[:2], output=run, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_model_without_a_task_reads_the_form_of_its_vocabulary(form: str) -> None:
    """A vocabulary of one's own may have decomposed symbols, which NFC would make unknown."""
    words = [unicodedata.normalize(form, word) for word in ("café", "naïve", "plain")]
    vocabulary = Vocabulary(words)
    model = Seq2Seq(ModelConfig(hidden=4, embedding=4), len(vocabulary), len(vocabulary))
    found = Predictor(model, vocabulary, vocabulary)
    assert found(" ".join(words)).source == tuple(words)
    other = unicodedata.normalize("NFD", "café")
    if form == "NFC":
        assert found(other).source == ("café",)


@pytest.mark.parametrize("symbol", ["", "\ud800"])
def test_a_vocabulary_that_could_not_be_loaded_is_not_saved(tmp_path: Path, symbol: str) -> None:
    vocabulary = Vocabulary(["a", symbol])
    model = Seq2Seq(ModelConfig(hidden=4, embedding=4), len(vocabulary), len(vocabulary))
    with pytest.raises(InputError, match="cannot save the model: the source vocabulary"):
        Predictor(model, vocabulary, vocabulary).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
