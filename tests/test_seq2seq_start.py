"""Runs that start from a trained model, and the average of several models."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints, find_checkpoint

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}
OPTIONS = ["--batch-size", "16", "--threads", "1", "--dropout", "0"]


def lines(words: list[str], count: int) -> list[str]:
    """Sentences of up to four of these words."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        length = int(torch.randint(1, 5, (), generator=generator))
        chosen = [words[i] for i in torch.randint(len(words), (length,), generator=generator)]
        found.append(" ".join(chosen) + "\t" + " ".join(WORDS[word] for word in chosen))
    return found


def write(path: Path, text: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def train(output: Path, data: Path, *options: str) -> int:
    command = ["train", "pairs", "--output", str(output), "--train", str(data), *OPTIONS]
    return main([*command, "--dev", str(data), *options])


def parameters(path: Path) -> dict[str, Tensor]:
    return files.load_tensors(find_checkpoint(path), files.MODEL)


def first_loss(run: Path) -> float:
    with (run / "steps.csv").open() as file:
        return float(next(csv.DictReader(file))["loss"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has all the words."""
    directory = tmp_path_factory.mktemp("base")
    data = write(directory / "base.tsv", lines(list(WORDS), 400))
    shape = ["--hidden", "24", "--embedding", "8", "--cell", "gru"]
    assert train(directory / "run", data, *shape, "--epochs", "6", "--lr", "0.01") == 0
    return directory / "run"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Data with fewer words than the vocabulary of the model."""
    return write(tmp_path / "few.tsv", lines(["two", "five"], 100))


@pytest.mark.parametrize("kind", ["run", "float32", "int8"])
def test_a_training_begins_with_the_model(
    kind: str, base: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its parameters, vocabularies and options. Given options override; the rest is new."""
    origin = base
    if kind != "run":
        origin = tmp_path / "exported"
        assert main(["export", str(base), "--output", str(origin), "--store", kind]) == 0
    run = tmp_path / "run"
    options = ["--start-from", str(origin), "--dropout", "0.1", "--epochs", "1"]
    assert train(run, few, *options, "--batch-size", "200") == 0  # two checkpoints, none is pruned
    start, before = checkpoints(run)[0], parameters(origin)
    found = files.load_tensors(start, files.MODEL)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    meta, known = (files.load_metadata(path) for path in (start, find_checkpoint(base)))
    assert (meta["source"], meta["target"]) == (known["source"], known["target"])
    assert set(WORDS) < set(meta["source"])
    assert meta["model"] == known["model"] | {"dropout": 0.1}
    assert meta["position"]["step"] == 0
    capfd.readouterr()
    # A word that is in the vocabulary, but not in the new data.
    assert main(["predict", str(run), "three two"]) == 0
    assert capfd.readouterr().out == "drei zwei\n"


def test_what_was_learned_is_there(base: Path, few: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "on", few, "--start-from", str(base), "--max-steps", "1") == 0
    shape = ["--hidden", "24", "--embedding", "8", "--cell", "gru"]
    assert train(tmp_path / "new", few, *shape, "--max-steps", "1") == 0
    assert first_loss(tmp_path / "on") < 0.5 * first_loss(tmp_path / "new")


def test_it_can_be_resumed(
    base: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the vocabularies of the model, although the data has fewer words."""
    run, again = tmp_path / "run", tmp_path / "again"
    assert train(run, few, "--start-from", str(base), "--epochs", "2") == 0
    shutil.copytree(run, again)
    shutil.rmtree(checkpoints(again)[-1])
    # The same --start-from again, as from a configuration file, is fine; another is refused.
    capfd.readouterr()
    assert train(again, few, "--resume", "--start-from", str(run)) == 2
    assert "--start-from is not that of the run in" in capfd.readouterr().err
    assert train(again, few, "--resume", "--start-from", str(base)) == 0
    expected, found = (
        files.load_tensors(checkpoints(path)[-1], files.MODEL) for path in (run, again)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_does_not_fit_is_refused(
    base: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, start = tmp_path / "run", ["--start-from", str(base)]
    cases = [
        (few, [*start, "--hidden", "23"], "--start-from: .* has another shape: hidden 24, not 23$"),
        (few, [*start, "--cell", "lstm"], "--start-from: .* another shape: cell gru, not lstm$"),
        (few, [*start, "--tokens", "subwords"], "--tokens subwords are those of the model, and"),
        (few, ["--start-from", str(tmp_path / "nowhere")], "no checkpoint at .*no such directory"),
    ]
    for data, options, message in cases:
        assert train(run, data, *options) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(message, error), error
        assert not run.exists()
    assert main(["train", "scan", "--output", str(run), *start]) == 2
    assert "is pairs" in capfd.readouterr().err


def test_a_symbol_that_the_model_does_not_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """If the vocabulary has no symbol for unknown ones."""

    def reverse(output: Path, numbers: int, *options: str) -> int:
        size = ["--numbers", str(numbers), "--pairs", "50", "--longest", "3", "--test-longest", "4"]
        command = ["train", "reverse", "--output", str(output), "--hidden", "8", *OPTIONS]
        return main([*command, *size, "--max-steps", "1", *options])

    assert reverse(tmp_path / "five", 5) == 0
    assert reverse(tmp_path / "more", 9, "--start-from", str(tmp_path / "five")) == 2
    error = capfd.readouterr().err
    assert re.search("the training pairs contain the symbol '[5-8]', which is not in", error)
    assert not (tmp_path / "more").exists()


def test_the_mean_of_models(base: Path, few: Path, tmp_path: Path) -> None:
    """It equals the mean by hand and can predict; the models may differ in dropout."""
    runs = [base]
    for seed, dropout in (("1", "0"), ("2", "0.3")):
        runs.append(tmp_path / seed)
        options = ["--seed", seed, "--dropout", dropout, "--lr", "1e-4", "--epochs", "1"]
        assert train(runs[-1], few, "--start-from", str(base), *options) == 0
    models = [parameters(run) for run in runs]
    assert all(not torch.equal(models[1][name], models[2][name]) for name in models[0])
    mean = tmp_path / "mean"
    others = [text for run in runs[1:] for text in ("--average", str(run))]
    assert main(["export", str(base), *others, "--output", str(mean)]) == 0
    for name, tensor in parameters(mean).items():
        expected = sum(model[name].double() for model in models) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == torch.float32
    assert "dev" not in files.load_metadata(mean)  # it has not been evaluated
    assert main(["predict", str(mean), "three two"]) == 0


def test_a_mean_of_what_does_not_go_together(
    base: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden", "24", "--embedding", "8", "--cell", "gru", "--max-steps", "1"]
    assert train(tmp_path / "words", few, *shape) == 0
    assert train(tmp_path / "shape", few, "--max-steps", "1", "--hidden", "8") == 0
    capfd.readouterr()
    for name, message in (("words", "vocabularies"), ("shape", "options")):
        output = tmp_path / "mean"
        command = ["export", str(base), "--average", str(tmp_path / name), "--output", str(output)]
        assert main(command) == 2
        error = capfd.readouterr().err
        assert message in error and str(tmp_path / name) in error
        assert not output.exists()
