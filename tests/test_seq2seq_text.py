"""Tasks on texts: subwords, translation, dialogs, links, data on disk, configuration files."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import sacrebleu
import torch

from fused_attn.cli import main
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pair_files import PairFile, Reader
from fused_attn.seq2seq.data.tokenizers import Subwords, learn_subwords
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.losses import guided_alignment_loss
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks import chat
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig

# The words of two languages. A translation reverses the order of the words.
LEXICON = {
    "the": "le", "cat": "고양이", "dog": "חתול", "sees": "voit", "house": "maison", "red": "rouge",
    "old": "ancien", "and": "et", "bird": "oiseau", "walks": "marche",
}  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """Lines with a source, a target and links."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        words = generator.choices(list(LEXICON), k=generator.randint(2, 6))
        target = " ".join(LEXICON[word] for word in reversed(words))
        links = " ".join(f"{i}-{len(words) - 1 - i}" for i in range(len(words)))
        lines.append(f"{' '.join(words)}\t{target}\t{links}")
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_subwords_bring_every_script_back() -> None:
    texts = ["the cat sees the dog", "l'été déjà", "고양이가 집을 봅니다", "שלום עולם", "猫が見る"]
    corpus = [*texts * 30, *(line.split("\t")[0] for line in sentences(300))]
    model = learn_subwords(iter(corpus), 200)
    tokenizer = Subwords(model)
    for text in texts:
        assert tokenizer.join(tokenizer.split(text)) == text
        assert set(tokenizer.split(text)) <= set(tokenizer.pieces)
    assert len(tokenizer.split("the cat sees the dog")) < 12  # the text has 20 characters
    assert (
        learn_subwords(iter(corpus), 200) == model
    )  # deterministic: a resumed run learns the same model
    with pytest.raises(InputError, match="vocabulary 5: cannot learn subwords"):
        learn_subwords(iter(texts), 5)


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained translation model, and its test file."""
    directory = tmp_path_factory.mktemp("translation")
    lines = [line.rpartition("\t")[0] for line in sentences(900)]
    columns = [write(directory / name, [line.split("\t")[i] for line in lines]) for i, name in
               enumerate(("source.txt", "target.txt"))]  # fmt: skip
    test = write(
        directory / "test.tsv", [line.rpartition("\t")[0] for line in sentences(60, seed=1)]
    )
    config = write(
        directory / "config.yaml",
        [
            "task: translate",
            f"train: {columns[0]},{columns[1]}  # two files",
            f"test: {test}",
            "model:",
            "  hidden: 64",
            "  embedding: 32",
            "  input_feeding: false",
            "  dropout: 0",
            "recipe: {epochs: 20, lr: 0.5, batch_tokens: 800, label_smoothing: 0}",
            "vocabulary: 60",
        ],
    )
    run = directory / "run"
    # The command line overrides the file.
    assert main(["train", str(config), "--output", str(run), "--lr", "0.01"]) == 0
    for path in columns:
        path.unlink()  # a checkpoint has everything needed for prediction
    return run, test


def test_translate(translation: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    run, test = translation
    # A sentence that occurs twice is evaluated once.
    pairs = list(dict(line.split("\t") for line in test.read_text().splitlines()).items())
    capfd.readouterr()
    assert main(["predict", str(run), *(source for source, _ in pairs)]) == 0
    found = capfd.readouterr().out.splitlines()
    assert len(found) == len(pairs) > 50
    bleu = sacrebleu.corpus_bleu(found, [[target for _, target in pairs]]).score
    assert bleu > 80
    epochs = (run / "epochs.csv").read_text().splitlines()
    assert epochs[0].split(",")[3:5] == ["BLEU", "chrF"]
    # The best checkpoint has the highest BLEU.
    values = [float(line.split(",")[3]) for line in epochs[1:]]
    assert main(["evaluate", str(run), "--test", str(test), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["BLEU"] == pytest.approx(bleu / 100, abs=1e-6)
    assert "cannot check whether the model was trained on these sentences" in captured.err
    best = max(range(20), key=lambda i: values[i])
    kept = sorted(path.name[-2:] for path in (run / "checkpoints").iterdir())
    assert any(values[int(name) - 1] == values[best] for name in kept)


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", ["x", "y"]), write(tmp_path / "b", ["x"])
    with pytest.raises(InputError, match=f"{second} ends after line 1, but {first} has more"):
        list(PairFile(f"{first},{second}", Reader()))


def test_links_guide_the_alignment(tmp_path: Path) -> None:
    """With links, the weights agree with them after the same amount of training."""
    train = write(tmp_path / "train.tsv", sentences(400))
    data = Pairs(PairsConfig(train=str(train), dev=str(train))).load(links=True)
    pair = next(iter(data.train))
    assert pair.links[:2] == (0, len(pair.source) - 1)
    argv = f"pairs --train {train} --dev {train} --hidden 32 --embedding 16 --epochs 4 --lr 0.01"
    rates = {}
    for guided in (0.0, 1.0):
        run = tmp_path / f"guided-{guided}"
        options = [*argv.split(), "--output", str(run), "--dropout", "0", "--guided", str(guided)]
        options += ["--batch-size", "128"]
        assert main(["train", *options]) == 0
        lines = sentences(40, seed=3)
        gold = write(tmp_path / "gold.pharaoh", [line.split("\t")[2] for line in lines])
        found = tmp_path / "found.pharaoh"
        sources = [line.split("\t")[0] for line in lines]
        assert main(["predict", str(run), *sources, "--alignments", str(found)]) == 0
        rates[guided] = agreement(found, gold)
    assert rates[1.0] > 0.9
    assert rates[1.0] > rates[0.0] + 0.1


def agreement(found: Path, gold: Path) -> float:
    """The share of correct links."""
    right = total = 0
    for line, expected in zip(*(p.read_text().splitlines() for p in (found, gold)), strict=True):
        links = set(line.split())
        right += len(links & set(expected.split()))
        total += len(links)
    return right / total


def test_the_guided_loss_is_the_cross_entropy_of_the_links() -> None:
    examples = Examples.collect([((3, 4, 5), (6, 7), (0, 0, 2, 0, 1, 1)), ((3,), (6,), ())])
    batch = examples.batch(torch.tensor([0, 1]))
    assert batch.alignment is not None
    assert batch.alignment.tolist() == [
        [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0] * 3],  # EOS has no link
        [[0.0] * 3] * 3,
    ]
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 3).softmax(dim=-1)
    first = -(0.5 * weights[0, 0, 0].log() + 0.5 * weights[0, 0, 2].log() + weights[0, 1, 1].log())
    torch.testing.assert_close(guided_alignment_loss(weights, batch.alignment), first)
    model = Seq2Seq(ModelConfig(hidden=8, embedding=4, dropout=0.0), 9, 9)
    arguments = (batch.source, batch.source_lengths, batch.target)
    plain = model.loss(*arguments)
    _, given = model(*arguments[:2], batch.target[:, :-1], return_weights=True)
    guided = model.loss(*arguments, alignment=batch.alignment, guided_weight=0.7)
    expected = plain + 0.7 * guided_alignment_loss(given, batch.alignment) / batch.tokens
    torch.testing.assert_close(guided, expected)


def test_guided_needs_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.tsv", [line.rpartition("\t")[0] for line in sentences(20)])
    argv = ["train", "pairs", "--train", str(train), "--output", str(tmp_path / "run")]
    assert main([*argv, "--guided", "0.1"]) == 2
    assert "--guided needs alignment links, and no training pair has any" in capfd.readouterr().err


def test_pairs_on_the_disk_train_the_same(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", sentences(300))
    tables = []
    for options in ([], ["--on-disk"]):
        run = tmp_path / f"run{len(tables)}"
        argv = f"train pairs --train {train} --output {run} --hidden 16 --embedding 8 --epochs 1"
        assert main([*argv.split(), *options]) == 0
        tables.append((run / "steps.csv").read_text())
        assert (run / "pairs").exists() == bool(options)
    assert tables[0] == tables[1]


def test_pairs_on_the_disk_do_not_fill_the_memory(tmp_path: Path) -> None:
    """40 bytes per pair stay in memory, of 1,600 and more."""
    count, length = 4_000, 200

    def pairs() -> object:
        for i in range(count):
            numbers = [3 + (i + j) % 50 for j in range(length)]
            yield numbers, numbers, ()

    peaks = {}
    for name, directory in (("memory", None), ("disk", tmp_path)):
        tracemalloc.start()
        examples = Examples.collect(pairs(), directory)  # type: ignore[arg-type]
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows = torch.tensor([0, 17, count - 1])
        batch = examples.batch(rows)
        assert batch.source[:, 0].tolist() == [3 + int(row) % 50 for row in rows]
        assert batch.target.shape == (3, length + 2)
    assert peaks["memory"] > 2 * 4 * count * length
    assert peaks["disk"] < peaks["memory"] / 4


def test_the_corpus_has_dialogs_in_english_and_korean() -> None:
    for language, word in (("english", "What is AI?"), ("korean", "무엇")):
        found = chat.read_corpus(language)
        texts = [utterance for dialog in found for utterance in dialog]
        assert len(texts) > 600 and any(word in text for text in texts)
        assert all(text == " ".join(text.split()) for text in texts)
    with pytest.raises(InputError, match=r"corpus must be one of .*english.* got 'elvish'"):
        chat.read_corpus("elvish")
    data = Chat(ChatConfig(corpus="korean", vocabulary=1200)).load()
    pairs = list(data.train)
    assert len(pairs) > 500
    assert "▁" in "".join(pairs[0].source)


def test_chat(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model learns the user's own dialogs by heart: each utterance answers the last one."""
    lines = ["hello", "good morning", "how are you?", "fine", "", "안녕하세요", "반갑습니다"]
    file = write(tmp_path / "dialogs.txt", lines)
    run = tmp_path / "run"
    argv = f"train chat --dialogs {file} --tokens chars --output {run} --hidden 32 --embedding 16"
    options = "--epochs 150 --lr 0.01 --dropout 0 --batch-size 2"
    assert main([*argv.split(), *options.split()]) == 0
    assert "perplexity" in (run / "epochs.csv").read_text()
    capfd.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n안녕하세요\nhow are you?\n"))
    assert main(["chat", str(run)]) == 0
    assert capfd.readouterr().out.splitlines() == ["good morning", "반갑습니다", "fine"]
    assert main(["evaluate", str(run)]) == 0
    assert "perplexity" in capfd.readouterr().out
    lonely = write(tmp_path / "one.txt", ["hello", "", "you"])
    assert main(["train", "chat", "--dialogs", str(lonely), "--output", str(tmp_path / "x")]) == 2
    assert "has no dialog" in capfd.readouterr().err


CONFIGS = {
    "nothing": ("", "expected a line 'task: NAME'"),
    "a list": ("- task", "expected a line 'task: NAME'"),
    "no yaml": ("task: {", "cannot read"),
    "a list as value": ("task: reverse\nepochs: [1, 2]", "line 2: epochs must have one value"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_configurations(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = CONFIGS[kind]
    config = tmp_path / "config.yml"
    config.write_text(text)
    assert main(["train", str(config), "--output", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert message in error and str(config) in error and error.count("\n") == 1


def test_a_configuration_with_an_unknown_option(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "config.yml", ["task: reverse", "hiden: 3"])
    assert main(["train", str(config), "--output", str(tmp_path / "run")]) == 2
    assert f"{config}: there is no option --hiden\n" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_curves(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, bleu in (("first", 0.125), ("second", 0.375)):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        steps = ["step,epoch,loss,lr,tokens,sampling"]
        steps += [f"{n},1,{5 / n},0.1,9,0" for n in range(1, 60)]
        write(runs[-1] / "steps.csv", steps)
        write(runs[-1] / "epochs.csv", ["epoch,step,train_loss,BLEU,seconds", f"1,59,1,{bleu},3"])
    picture = tmp_path / f"curves.{kind}"
    assert main(["curves", *map(str, runs), "--output", str(picture)]) == 0
    if kind == "svg":
        text = picture.read_text()
        assert all(part in text for part in ("loss, nats per symbol", "BLEU, %", "first", "second"))
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")
    (runs[0] / "steps.csv").unlink()
    assert main(["curves", *map(str, runs), "--output", str(picture)]) == 2
    assert f"{runs[0]} has no training log" in capfd.readouterr().err


def test_a_start_that_fails_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So the user can try again with the same directory."""
    train = write(tmp_path / "train.tsv", [*sentences(50), "no tab"])
    run = tmp_path / "new" / "run"
    argv = ["train", "pairs", "--train", str(train), "--output", str(run), "--on-disk"]
    assert main(argv) == 2
    assert "line 51" in capfd.readouterr().err
    assert not run.exists()
    run.mkdir(parents=True)
    assert main(argv) == 2
    assert list(run.iterdir()) == []
