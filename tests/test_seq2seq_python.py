"""The toolkit from Python: load, predict, fit, save, and the error messages."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq import (
    BOS,
    EOS,
    InputError,
    ModelConfig,
    Prediction,
    Predictor,
    Seq2Seq,
    TrainingConfig,
    Vocabulary,
)
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.training.trainer import Trainer

WORDS = ["attention", "hello", "a", "pronunciation", "world"]
SHAPE = ModelConfig(hidden=16, embedding=8, dropout=0.1)
RECIPE = TrainingConfig(epochs=3, batch_size=8, lr=2e-2)


@pytest.fixture(scope="module")
def model() -> Predictor:
    return seq2seq.load("g2p", device="cpu")


def spelled(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Words of three letters, with the reversed letters in capitals as targets."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcde", k=draw.randint(1, 5))) for _ in range(count)]
    return [(word, " ".join(reversed(word.upper()))) for word in words]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("fitted") / "run"
    pairs = spelled(120)
    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE, "device": "cpu"}
    seq2seq.fit(pairs, dev=spelled(20, seed=1), output=run, progress=False, **options)
    return run


def test_every_name_is_there_and_costs_nothing_before_it_is_used() -> None:
    for name in seq2seq.__all__:
        assert getattr(seq2seq, name).__doc__ or isinstance(getattr(seq2seq, name), int), name
    assert set(seq2seq.__all__) <= set(dir(seq2seq))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        seq2seq.train  # noqa: B018
    code = "import sys; from fused_attn import seq2seq; seq2seq.ModelConfig; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "lightning_fabric", "safetensors"} & set(loaded)


def test_one_text_a_list_and_an_iterator(model: Predictor) -> None:
    one = model("hello")
    assert isinstance(one, Prediction) and isinstance(one.score, float)
    assert one.text == " ".join(one.tokens) == str(one) == "HH EH L OW"
    assert one.source == tuple("hello") and one.alternatives == (one,)
    many = model(WORDS, batch_size=2)
    assert isinstance(many, list) and [p.source for p in many] == [tuple(word) for word in WORDS]
    assert many[1].tokens == one.tokens and many[1].score == pytest.approx(one.score, abs=1e-5)
    assert [p.text for p in model(tuple(WORDS))] == [p.text for p in many]
    assert model([]) == []
    # Texts are processed as by the command; tokens are used as they are.
    assert model("HELLO") == one == model([tuple("hello")])[0]
    asked: list[str] = []

    def stream() -> Iterator[str]:
        for word in itertools.cycle(WORDS):
            asked.append(word)
            yield word

    found = model(stream(), batch_size=3)
    assert not isinstance(found, list) and not asked
    assert [p.text for p in itertools.islice(found, 4)] == [p.text for p in [*many, *many][:4]]
    assert len(asked) == 6  # two batches


@pytest.mark.parametrize(
    "search",
    [{}, {"beam": 4, "nbest": 3}, {"sample": True, "seed": 5}, {"beam": 3, "block_ngrams": 2}],
    ids=str,
)
def test_scores_are_those_of_the_model(search: dict[str, object]) -> None:
    """They equal the probabilities of the target under teacher forcing."""
    model = seq2seq.load("g2p", device="cpu", compute="float32")
    (network,) = model.models
    for found in model(WORDS, **search):
        assert len(found.alternatives) == search.get("nbest", 1)
        scores = [each.ranking_score for each in found.alternatives]
        assert scores == sorted(scores, reverse=True)
        for each in found.alternatives:
            source = torch.tensor([model.source.encode(each.source)])
            target = model.target.encode(each.tokens)
            with torch.inference_mode():
                logits, _ = network(
                    source, torch.tensor([source.shape[1]]), torch.tensor([[BOS, *target]])
                )
            log_probs = logits[0].double().log_softmax(dim=-1)
            expected = [float(log_probs[t, s]) for t, s in enumerate([*target, EOS])]
            assert each.token_scores == pytest.approx(expected[:-1], abs=2e-5)
            assert each.score == pytest.approx(sum(expected), abs=1e-4)
            assert each.ranking_score == pytest.approx(each.score / len(expected), abs=1e-5)


def test_alignments_are_weights(model: Predictor) -> None:
    found = model("attention", beam=3, nbest=2)
    for each in found.alternatives:
        assert each.alignment is not None
        assert each.alignment.shape == (len(each.tokens), len("attention"))
        torch.testing.assert_close(each.alignment.sum(dim=1), torch.ones(len(each.tokens)))
    assert model("attention", alignments=False).alignment is None
    assert pickle.loads(pickle.dumps(found)).alternatives == found.alternatives


def test_messages_name_the_text(model: Predictor) -> None:
    with pytest.raises(InputError, match=r"^'he11o': unknown symbol '1'; known symbols: ' a b"):
        model("he11o")
    with pytest.raises(InputError, match=r"^'': the source is empty"):
        model("")
    with pytest.raises(InputError, match=r"^source 2, 'b1': unknown symbol '1'"):
        model(["ok", "b1"])
    with pytest.raises(InputError, match=r"^source 4, 'b1': unknown symbol '1'"):
        list(model(iter(["a", "a", "a", "b1"]), batch_size=2))
    with pytest.raises(InputError, match=r"source 2, 7: expected a text or a sequence of tokens"):
        model(["ok", 7])
    with pytest.raises(InputError, match="a list of texts or an iterator, got int"):
        model(7)
    with pytest.raises(TypeError, match="beams"):
        model("hello", beams=3)
    with pytest.raises(ValueError, match="nbest must be at most beam = 1, got 3"):
        model("hello", nbest=3)
    with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
        model("hello", batch_size=0)


def test_a_notebook_shows_what_was_looked_at(model: Predictor) -> None:
    found = model("hello", beam=2, nbest=2)
    assert repr(found).startswith("Prediction('HH EH L OW', score=-0.37")
    assert "1 more alternatives" in repr(found) and len(repr(model.source)) < 80
    assert "g2p" in repr(model) and "general" in repr(model)
    cells: list[dict[str, str | None]] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("div", "b", "table", "tr", "th", "td")
            if tag == "td":
                cells.append(dict(attrs))

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Reader().feed(found._repr_html_())
    assert found.alignment is not None
    weights = [f"{weight:.3f}" for weight in found.alignment.flatten().tolist()]
    assert [cell["title"] for cell in cells] == weights
    assert texts[0] == "HH EH L OW" and [t for t in texts[2:] if t != "\xa0"] == [
        *"hello",
        *("HH", "EH", "L", "OW"),
    ]
    hostile = Prediction(("<script>",), ("<b>",), "<img>", 0.0, alignment=torch.ones(1, 1))
    Reader().feed(hostile._repr_html_())
    assert "(log probability" in Prediction((), (), "x", 0.0)._repr_html_()


def test_names_and_paths(fitted: Path, model: Predictor, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(fitted)
    texts = {str(seq2seq.load(path)("abc")) for path in (fitted, str(fitted), checkpoint)}
    assert len(texts) == 1
    assert str(Predictor.load(str(fitted))("abc")) in texts
    with pytest.raises(InputError, match="no checkpoint at nowhere: there is no such directory"):
        seq2seq.load("nowhere")
    with pytest.raises(InputError, match=r"the vocabularies of .* differ from those of"):
        seq2seq.load("g2p", fitted)
    with pytest.raises(TypeError, match="needs the name or the path of a model"):
        seq2seq.load()
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        seq2seq.load("g2p", device="tpu")
    with pytest.raises(InputError, match="backend must be one of"):
        seq2seq.load("g2p", backend="none")
    both = seq2seq.load(fitted, fitted)
    assert "2 models" in repr(both) and both("abc").text in texts
    with pytest.raises(InputError, match="cannot save an ensemble of 2 models as one checkpoint"):
        both.save(tmp_path / "both")


@pytest.mark.parametrize("store", ["float32", "float16", "int8"])
def test_saved_and_loaded(store: str, fitted: Path, tmp_path: Path) -> None:
    model = seq2seq.load(fitted)
    model.save(str(tmp_path / "saved"), store=store)
    assert sorted(os.listdir(tmp_path / "saved")) == ["checkpoint.json", "model.safetensors"]
    again = seq2seq.load(tmp_path / "saved")
    texts = [source for source, _ in spelled(10, seed=2)]
    exact = [p.text for p in model(texts)]
    assert sum(a == p.text for a, p in zip(exact, again(texts), strict=True)) >= 9
    if store == "float32":
        assert again(texts) == model(texts)
        values = json.loads((tmp_path / "saved" / "checkpoint.json").read_text())
        assert not {"position", "start_from", "teacher"} & values.keys()
    with pytest.raises(InputError, match="already exists"):
        model.save(tmp_path / "saved")
    with pytest.raises(InputError, match="store must be one of float32, float16, int8, got 'int4'"):
        model.save(tmp_path / "other", store="int4")
    assert os.listdir(tmp_path) == ["saved"]


def test_the_command_line_uses_what_python_trained(
    fitted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "test.tsv"
    lines.write_text("".join(f"{s}\t{t}\n" for s, t in spelled(15, seed=3)))
    assert main(["predict", str(fitted), "abc"]) == 0
    assert capfd.readouterr().out.strip() == seq2seq.load(fitted)("abc").text
    assert main(["evaluate", str(fitted), "--test", str(lines), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    model = seq2seq.load(fitted)
    for pairs in (str(lines), lines, spelled(15, seed=3), iter(spelled(15, seed=3))):
        measures = seq2seq.evaluate(model, pairs)
        assert measures == {name: report[name] for name in ("lines wrong", "symbols wrong")}
    assert main(["evaluate", str(fitted)]) == 2
    assert "name a file with --test" in capfd.readouterr().err
    assert main(["train", "pairs", "--output", str(fitted), "--resume"]) == 2
    assert "seq2seq.fit(..., resume=True)" in capfd.readouterr().err
    with pytest.raises(InputError, match="pair 2: expected a source and a target"):
        seq2seq.evaluate(model, [("a", "A"), ("a", "b", "c")])  # type: ignore[list-item]
    with pytest.raises(InputError, match="there are no pairs to evaluate on"):
        seq2seq.evaluate(model, [])


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return seq2seq.load(run, device="cpu").models[0].state_dict()


def same(a: Path, b: Path) -> bool:
    x, y = parameters(a), parameters(b)
    return all(torch.equal(x[name], y[name]) for name in x.keys() | y.keys())


def test_pairs_of_every_kind_train_the_same_model(tmp_path: Path) -> None:
    """Texts, tokens, a generator, a file, and the command. Torch's random state is restored."""
    pairs = spelled(60)
    options = {"model": SHAPE, "training": RECIPE, "progress": False, "device": "cpu"}
    tokens = {"tokens": ("chars", "words")}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    seq2seq.fit(pairs, output=tmp_path / "texts", **tokens, **options)
    assert torch.equal(torch.get_rng_state(), before)
    sequences = [(tuple(s), t.split()) for s, t in pairs]
    seq2seq.fit(iter(sequences), output=tmp_path / "tokens", **tokens, **options)
    assert same(tmp_path / "texts", tmp_path / "tokens")
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{s}\t{t}\n" for s, t in pairs))
    seq2seq.fit(file, output=tmp_path / "file", **tokens, **options)
    assert same(tmp_path / "texts", tmp_path / "file")
    command = ["train", "pairs", "--train", str(file), "--output", str(tmp_path / "command")]
    command += ["--source-tokens", "chars", "--target-tokens", "words", "--device", "cpu"]
    command += ["--hidden", "16", "--embedding", "8", "--dropout", "0.1"]
    assert main([*command, "--epochs", "3", "--batch-size", "8", "--lr", "2e-2"]) == 0
    assert same(tmp_path / "texts", tmp_path / "command")


def test_a_stopped_fit_goes_on_to_the_same_model(
    tmp_path: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, dev = spelled(120), spelled(20, seed=1)
    options = {"tokens": ("chars", "words"), "model": SHAPE, "training": RECIPE, "device": "cpu"}
    step = Trainer._step

    def stopping(self: Trainer, rows: torch.Tensor) -> object:
        report = step(self, rows)
        if report.step == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(KeyboardInterrupt, match="resume=True"):
            seq2seq.fit(pairs, dev=dev, output=run, progress=False, **options)
    with pytest.raises(InputError, match=r"is not an empty directory; .* pass resume=True"):
        seq2seq.fit(pairs, dev=dev, output=run, progress=False, **options)
    with pytest.raises(InputError, match="the training pairs have changed"):
        seq2seq.fit(pairs[1:], dev=dev, output=run, resume=True, progress=False)
    seq2seq.fit(pairs, dev=dev, output=run, resume=True, progress=False, device="cpu")
    assert same(run, fitted)
    assert (run / "steps.csv").read_bytes() == (fitted / "steps.csv").read_bytes()
    # The run is complete.
    again = seq2seq.fit(pairs, dev=dev, output=run, resume=True, progress=False, device="cpu")
    assert again("abc") == seq2seq.load(run, device="cpu")("abc")


def test_in_a_thread(tmp_path: Path, fitted: Path) -> None:
    """`fit` and the command work in a thread, where Python does not deliver signals."""
    found: list[object] = []

    def work() -> None:
        options = {"model": SHAPE, "training": RECIPE, "tokens": ("chars", "words")}
        dev = spelled(20, seed=1)
        run = tmp_path / "fit"
        seq2seq.fit(spelled(120), dev=dev, output=run, progress=False, device="cpu", **options)
        command = ["train", "reverse", "--pairs", "40", "--hidden", "8", "--epochs", "1"]
        found.append(main([*command, "--attn-dim", "8", "--output", str(tmp_path / "command")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0] and same(tmp_path / "fit", fitted)


def test_skipped_pairs_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [*spelled(30), ("a", "")]
    options = {"model": SHAPE, "training": RECIPE, "tokens": ("chars", "words")}
    seq2seq.fit(pairs, dev=spelled(5), output=tmp_path / "run", skip_bad=True, **options)
    captured = capfd.readouterr()
    assert "note: pairs: skipped 1 bad pair\n" in captured.err
    assert captured.err.count("epoch ") == 3 and not captured.out


def test_from_a_model_and_from_teachers(fitted: Path, tmp_path: Path) -> None:
    options = {"training": TrainingConfig(epochs=1, batch_size=8), "progress": False}
    pairs, dev = spelled(60, seed=5), spelled(10, seed=6)
    started = seq2seq.fit(pairs, dev=dev, output=tmp_path / "a", start_from=fitted, **options)
    assert started.source.symbols == seq2seq.load(fitted).source.symbols
    assert started.task.to_json()["source_tokens"] == "chars"
    taught = {"tokens": ("chars", "words"), "model": SHAPE, "teachers": [fitted]}
    symbols = [("abcde", "A B C D E")] * 3  # so that the vocabularies agree
    file = Path(tmp_path, "t.tsv")
    file.write_text("".join(f"{s}\t{t}\n" for s, t in [*spelled(120), *symbols]))
    found = seq2seq.fit(spelled(120), dev=dev, output=tmp_path / "b", **taught, **options)
    assert (tmp_path / "b" / "teacher.safetensors").exists()
    assert math.isfinite(found("abc").score)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Without a task or a checkpoint. Predictions do not disturb training."""
    torch.manual_seed(1)
    source, target = Vocabulary("abc"), Vocabulary(["A", "B"])
    network = Seq2Seq(ModelConfig(hidden=8, embedding=4, score="concat"), len(source), len(target))
    model = Predictor(network, source, target)
    network.encoder.eval()  # frozen, in the middle of a training
    modes = [module.training for module in network.modules()]
    assert network.training and not all(modes)
    first = model("a b c")
    assert first == model("a b c")  # no dropout
    assert [module.training for module in network.modules()] == modes
    model.save(tmp_path / "own")
    again = seq2seq.load(tmp_path / "own", device="cpu")
    assert again("a b c") == first and again.task.name == "pairs"


def test_standard_input_may_be_a_stream_of_python(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nworld\n"))
    assert main(["predict", "g2p"]) == 0
    assert capfd.readouterr().out == "HH EH L OW\nW ER L D\n"
