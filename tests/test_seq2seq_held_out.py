"""The development set: what is held out of the training pairs, and what notes say about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import last_checkpoint
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig
from fused_attn.seq2seq.tasks.registry import make_task
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig

TINY = ["--hidden", "8", "--embedding", "8", "--epochs", "1"]
SHAPE, RECIPE = ModelConfig(hidden=8, embedding=8), TrainingConfig(max_steps=2)


def lines(count: int) -> list[str]:
    """Lines with a symbol of their own on both sides."""
    return [f"w{n} x\tv{n} y" for n in range(count)]


def write(path: Path, text: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in text))
    return str(path)


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_little_data_is_all_trained_on(
    tmp_path: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.tsv", lines(count))
    task = Pairs(PairsConfig(train=path))
    data = task.load()
    assert len(list(data.train)) == len(data.dev) == count
    assert {item.source for item in data.dev} == {pair.source for pair in data.train}
    plural = "" if count == 1 else "s"
    note = (
        f"{path}: too small to hold out a development set, so the training pairs ({count} "
        f"pair{plural}) are also the development set; --dev names another"
    )
    assert data.notes == (note,)
    run = tmp_path / "run"
    assert main(["train", "pairs", "--train", path, "--output", str(run), *TINY]) == 0
    assert capfd.readouterr().err.startswith(f"note: {note}\n")


def test_five_pairs_are_learned_by_heart(tmp_path: Path) -> None:
    """None of them is held out in silence, so the model knows all of them."""
    pairs = [("hello", "bonjour"), ("cat", "chat"), ("dog", "chien"), ("good day", "bonne journée"),
             ("thanks", "merci")]  # fmt: skip
    model = seq2seq.fit(
        pairs,
        output=tmp_path / "run",
        tokens="chars",
        model=ModelConfig(hidden=48, embedding=16, dropout=0.0),
        training=TrainingConfig(epochs=80, batch_size=2, lr=0.01),
        progress=False,
        device="cpu",
    )
    assert [model(source).text for source, _ in pairs] == [target for _, target in pairs]


def test_few_sources_are_little_data(tmp_path: Path) -> None:
    """Of 40 sources fewer than ten would be held out, however often they occur."""
    path = write(tmp_path / "a.tsv", lines(40) * 80)
    data = Pairs(PairsConfig(train=path)).load()
    assert len(list(data.train)) == 3_200 and len(data.dev) == 40
    assert "the training pairs (its first 2,000 pairs) are also the" in data.notes[0]


@pytest.mark.parametrize("count", [1_000, 3_000])
def test_held_out_pairs_are_counted_and_are_not_bad(
    tmp_path: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.tsv", lines(count))
    for options in ({}, {"skip_bad": True}, {"tokens": "chars"}):
        data = Pairs(PairsConfig(train=path, **options)).load()  # type: ignore[arg-type]
        train, held = len(list(data.train)), len(data.dev)
        assert train + held == count and held == pytest.approx(0.02 * count, rel=0.5)
        assert held >= 10
        share = f"{100 * held / count:.1f} %"
        assert data.notes == (
            f"{path}: held out {held} of {count:,} pairs ({share}) as the development set; "
            "--dev names another",
        )
        assert not {pair.source for pair in data.train} & {item.source for item in data.dev}
    bad = write(tmp_path / "b.tsv", [*lines(count), "no tab", ""])
    run = tmp_path / "run"
    argv = ["train", "pairs", "--train", bad, "--output", str(run), *TINY, "--max-steps", "1"]
    assert main(argv) == 2
    assert f"{bad}, line {count + 1}: expected" in (error := capfd.readouterr().err)
    assert "--skip-bad skips such lines" in error
    assert main([*argv, "--skip-bad"]) == 0
    assert f"note: {bad}: skipped 2 bad lines\n" in capfd.readouterr().err


def test_notes_name_arguments_in_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [tuple(line.split("\t")) for line in lines(1_200)]
    seq2seq.fit(pairs, output=tmp_path / "run", model=SHAPE, training=RECIPE)
    error = capfd.readouterr().err
    assert re.search(r"note: pairs: held out \d+ of 1,200 pairs \(\d\.\d %\) .*; dev names", error)


def test_a_development_set_of_ones_own_holds_out_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", lines(2_000))
    dev = write(tmp_path / "dev.tsv", ["unheard\tof"])
    data = Pairs(PairsConfig(train=path, dev=dev)).load()
    assert len(list(data.train)) == 2_000 and len(data.dev) == 1 and data.notes == ()


def test_rare_targets_are_trained_on_as_unknown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --min-count a good line may have a target of only rare symbols: it is not refused."""
    path = write(tmp_path / "a.tsv", ["a\tA", "a\tA B", "b\tRare", "c\tB Other"])
    run = tmp_path / "run"
    argv = ["train", "pairs", "--train", path, "--output", str(run), *TINY, "--min-count", "2"]
    assert main([*argv, "--max-steps", "3"]) == 0
    error = capfd.readouterr().err
    assert f"{path}: 1 target with only unknown symbols; a smaller --min-count keeps more" in error
    assert main(["train", "pairs", "--output", str(run), "--resume"]) == 0
    data = Pairs(PairsConfig(train=path, min_count=2)).load()
    assert len(list(data.train)) == 4 and data.target.symbols == ("<unk>", "A", "B")


def test_dialogs(tmp_path: Path) -> None:
    few = write(tmp_path / "few.txt", [f"line {n}" for n in range(30)])
    data = Chat(ChatConfig(dialogs=few, tokens="words")).load()
    assert len(list(data.train)) == len(data.dev) == 29
    assert "too small to hold out" in data.notes[0] and "(29 pairs)" in data.notes[0]
    many = write(tmp_path / "many.txt", [f"line {n}" for n in range(1_501)])
    data = Chat(ChatConfig(dialogs=many, tokens="words")).load()
    assert len(list(data.train)) + len(data.dev) == 1_500 and len(data.dev) >= 10
    assert f"held out {len(data.dev)} of 1,500 pairs" in data.notes[0]


def test_bad_utterances_are_named_with_their_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.txt", ["hi", "you", "", "x " * 100, "long", "ok", "fine"])
    run = tmp_path / "run"
    argv = ["train", "chat", "--dialogs", path, "--tokens", "words", "--output", str(run), *TINY]
    assert main([*argv, "--no-skip-bad"]) == 2
    error = capfd.readouterr().err
    assert f"{path}, line 4: the source has 100 symbols, more than the 80 allowed, in" in error
    assert "--max-length allows longer ones, --skip-bad skips such pairs" in error
    assert main(argv) == 0
    assert f"note: {path}: skipped 1 bad pair\n" in capfd.readouterr().err
    only = write(tmp_path / "only.txt", ["x " * 100, "y"])
    argv[3] = only
    assert main([*argv[:-2], "--output", str(tmp_path / "other")]) == 2
    assert "no usable pairs (1 skipped), first " in capfd.readouterr().err


# --- runs of earlier versions

# Digests of the data, and sizes of the development and training sets, of version c5ed17a. They
# depend on which pairs are held out, and on how texts are read.
BEFORE = {
    "a file": ("bcda358c18e03a1f5b502435b8b594ce8c2d54636cfdd968ed40bc043ba54fd6", 2, 58),
    "dialogs": ("a7abe7ca4a06cbb12ade1c671337e9dc8f84dc67684aace4fa74d600714560cc", 1, 60),
    "a list": ("6240efe7513c7d5a6473fcf6d23c27471f383fd9433d74451fea5d83069db34a", 1, 59),
    "with dev": ("f4b971a56b00a2c0d3d75b72dc7ebf2d56af7331a07ad4759f364619171d6440", 1, 60),
    "four pairs": ("890b5883f6b9a91854f06030061a06150e0a63adf60853a18f4ca062928081bc", 1, 1),
}


def task_before(kind: str, tmp_path: Path) -> Pairs | Chat:
    """A task as its checkpoint described it before there were the newer fields."""
    forms = ("café", "cafe\u0301")
    accented = "".join(f"{forms[n % 2]} {n}\tn{n}\n" for n in range(60))
    path = tmp_path / "data"
    if kind == "a file":
        path.write_text("\ufeff" + accented)
        task = make_task({"name": "pairs", "train": str(path)})
    elif kind == "dialogs":
        path.write_text("\ufeffhi\n" + "".join(f"e\u0301 {n}\n" for n in range(60)))
        task = make_task({"name": "chat", "dialogs": str(path), "tokens": "words"})
    else:
        task = make_task({"name": "pairs"})
        assert isinstance(task, Pairs)
        task.given = {"train": [(f"e\u0301{n}", f"n{n}") for n in range(60)]}
        if kind == "with dev":
            task.given["dev"] = [("e\u0301", "x")]
        if kind == "four pairs":
            task.given["train"] = [("a", "b")] * 3 + [("c", "d")]
    assert isinstance(task, Pairs | Chat)
    return task


@pytest.mark.parametrize("kind", BEFORE)
def test_a_run_of_an_earlier_version_holds_out_what_it_did(kind: str, tmp_path: Path) -> None:
    data = task_before(kind, tmp_path).load()
    assert (data.fingerprint, len(data.dev), len(list(data.train))) == BEFORE[kind]


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Its checkpoint lacks the fields, and its five pairs were four and one."""
    path, run = write(tmp_path / "a.tsv", lines(5)), tmp_path / "run"
    argv = ["train", "pairs", "--output", str(run)]
    assert main([*argv, "--train", path, *TINY]) == 0
    metadata = last_checkpoint(run) / files.METADATA
    meta = json.loads(metadata.read_text())
    for field in ("normalization", "least_dev"):
        del meta["task"][field]
    before = make_task(meta["task"]).load()
    assert len(list(before.train)) == 4 and len(before.dev) == 1
    meta["training_pairs"] = before.fingerprint
    del meta["digests"], meta["dev_pairs"]
    metadata.write_text(json.dumps(meta))
    assert main([*argv, "--resume"]) == 0


def test_a_run_of_an_earlier_version_skips_the_lines_that_it_did(tmp_path: Path) -> None:
    """A third column that is no links, and a target of only rare symbols, were bad lines."""
    path = write(tmp_path / "a.tsv", ["a\tA", "b\tA\t0-0", "c\tA\tCC-BY", "d\tRare", "e\tA"])
    values = {"name": "pairs", "train": path, "dev": path, "skip_bad": True, "min_count": 2}
    found = {}
    for name, new in (("before", {}), ("now", {"least_dev": 10})):
        found[name] = list(make_task(values | new).load().train)
    assert ["".join(pair.source) for pair in found["before"]] == ["a", "b", "e"]
    assert found["before"][1].links == (0, 0)
    assert ["".join(pair.source) for pair in found["now"]] == ["a", "b", "c", "d", "e"]


# --- the digest of the development set


def test_the_development_set_has_a_digest_of_its_content(tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", lines(50))
    (tmp_path / "elsewhere").mkdir()
    paths = [write(tmp_path / name, lines(3)) for name in ("dev.tsv", "elsewhere/other.tsv")]
    found = [Pairs(PairsConfig(train=train, dev=dev)).load() for dev in paths]
    assert found[0].dev_fingerprint == found[1].dev_fingerprint
    assert re.fullmatch("[0-9a-f]{64}", found[0].dev_fingerprint)
    given = Pairs(PairsConfig())
    given.given = {
        name: [tuple(line.split("\t")) for line in text]
        for name, text in (("train", lines(50)), ("dev", lines(3)))
    }
    assert given.load().dev_fingerprint == found[0].dev_fingerprint
    other = write(tmp_path / "dev.tsv", [*lines(2), "w2 x\tz"])
    assert Pairs(PairsConfig(train=train, dev=other)).load().dev_fingerprint != (
        found[0].dev_fingerprint
    )
