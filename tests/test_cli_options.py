"""The options of the command: where they may stand, and what they rule out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_attn.cli import main, parse

ORDERS = {
    "train": (["g2p", "--output", "d", "--epochs", "3"], ["--epochs", "3", "g2p", "--output=d"]),
    "predict": (
        ["g2p", "hello", "world", "--beam", "5", "--scores"],
        ["g2p", "--beam", "5", "hello", "--scores", "world"],
    ),
    "evaluate": (["g2p", "--limit", "5"], ["--limit", "5", "g2p"]),
    "explain": (["g2p", "hello", "--output", "p"], ["--output", "p", "g2p", "hello"]),
    "aer": (["a", "b"], ["a", "b"]),
    "chat": (["g2p", "--sample", "--seed", "-1"], ["--sample", "g2p", "--seed", "-1"]),
    "curves": (["a", "b", "--output", "c.svg"], ["a", "--output", "c.svg", "b"]),
    "export": (
        ["g2p", "--output", "d", "--average", "e", "--average", "f"],
        ["--average", "e", "g2p", "--average", "f", "--output", "d"],
    ),
    "info": ([], []),
}


def values_of(*argv: str) -> dict[str, object]:
    return {name: value for name, value in vars(parse(argv)).items() if name != "command"}


@pytest.mark.parametrize("command", ORDERS)
def test_options_stand_anywhere_among_the_arguments(command: str) -> None:
    first, second = ORDERS[command]
    assert values_of(command, *first) == values_of(command, *second)


def test_arguments_stand_between_options() -> None:
    args = parse(["predict", "g2p", "--beam", "5", "hello"])
    assert (str(args.model), args.text, args.beam, args.nbest) == ("g2p", ["hello"], 5, None)
    args = parse(["predict", "g2p", "--scores", "a", "--", "-b", "--beam"])
    assert args.text == ["a", "-b", "--beam"]
    assert parse(["predict", "g2p"]).text == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train"],
            "fused-attn train: error: the following arguments are required: TASK, --output",
        ),
        (["train", "g2p", "--foo", "3"], "unrecognized arguments: --foo 3"),
        (["train", "g2p", "scan", "--output", "d"], "unrecognized arguments: scan"),
        (["predict", "g2p", "--bea", "5", "hello"], "unrecognized arguments: --bea"),
        (["curves", "--output", "a.svg"], "required: DIR"),
        (["explain", "g2p", "--output", "a.html"], "required: TEXT"),
        (["explain", "g2p", "hello"], "required: --output"),
        (["predict", "g2p", "--format", "xml"], "--format: invalid choice: 'xml'"),
    ],
)
def test_what_cannot_be_read(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


Fails = Callable[[str], str]


@pytest.fixture
def fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command line that must fail with one line, and leave nothing."""

    def check(command: str) -> str:
        output = ["--output", str(tmp_path / "new")] if command.startswith("train") else []
        capfd.readouterr()  # of what the test did before
        assert main([*command.split(), *output]) == 2
        assert not (tmp_path / "new").exists()
        lines = capfd.readouterr().err.splitlines(keepends=True)
        error = "".join(line for line in lines if not line.startswith("epoch "))  # progress
        assert error.startswith("fused-attn: error: ") and error.count("\n") == 1
        return error.removeprefix("fused-attn: error: ").rstrip()

    return check


WITHOUT_EFFECT = {
    "train g2p --window 5": "--window has no effect without --local",
    "train g2p --max-source 9": "--max-source has no effect without --score location",
    "train g2p --residual": "--residual has no effect without --layers above 1",
    "train g2p --variational --dropout 0": "--variational has no effect without --dropout above 0",
    "train translate --train x --no-bucket": "--no-bucket needs --batch-size",
    "train g2p --score none --coverage-loss 1": "--coverage-loss needs a --score other than none",
    "train g2p --score none --guided 1": "--guided needs a --score other than none",
    "train g2p --teacher-weight 0.3": "--teacher-weight needs a --teacher",
    "train g2p --teacher g2p --teacher-weight 1 --label-smoothing 0.1":
        "--label-smoothing has no effect with --teacher-weight 1",
    "train g2p --sampling-max 0.3": "--sampling-max has no effect without --sampling",
    "train g2p --sampling-per token": "--sampling-per has no effect without --sampling",
    "train g2p --sampling none --sampling-after 0.4":
        "--sampling-after has no effect without --sampling",
    "train pairs --train x --vocabulary 99": "--vocabulary has no effect without --tokens subwords",
    "train translate --train x --min-count 2": "--min-count has no effect with --tokens subwords",
    "train g2p --score none --backend eager": "--backend has no effect without a --score",
    "train g2p --attn-dim 9": "--attn-dim belongs to the score concat",
    "train g2p --coverage": "--coverage belongs to the score concat",
    "predict g2p a --temperature 0.5": "--temperature has no effect without --sample",
    "predict g2p a --top-k 3": "--top-k has no effect without --sample",
    "evaluate g2p --no-sample --top-p 0.9": "--top-p has no effect without --sample",
    "chat g2p --seed 3": "--seed has no effect without --sample",
    "predict g2p a --beam 2 --alpha 0.5": "--alpha has no effect without --length-penalty gnmt",
    "predict g2p a --length-penalty none": "--length-penalty has no effect without --beam above 1",
    "evaluate g2p --coverage-penalty 0.2":
        "--coverage-penalty has no effect without --beam above 1",
    "evaluate g2p --beam 3 --nbest 3": "--nbest has no effect here",
    "chat g2p --beam 3 --nbest 2": "--nbest has no effect here",
    "explain g2p hello --output x.html --nbest 3": "--nbest needs --beam",
    "predict g2p a --nbest-mass 0.9": "--nbest-mass needs --beam above 1",
    "predict g2p a --sample --nbest-mass 0.9": "--nbest-mass needs --beam above 1",
    "evaluate g2p --beam 3 --nbest-mass 0.9": "--nbest-mass has no effect here",
    "chat g2p --beam 3 --nbest-mass 0.9": "--nbest-mass has no effect here",
    "predict g2p a --format json --scores": "--scores goes with --format text",
    "predict g2p a --scores --format tsv": "--scores goes with --format text",
    "predict g2p a --with-alignment": "--with-alignment needs --format tsv or json",
    "predict g2p a --format text --with-alignment":
        "--with-alignment needs --format tsv or json",
}  # fmt: skip


@pytest.mark.parametrize("command", WITHOUT_EFFECT)
def test_an_option_is_not_silently_without_effect(command: str, fails: Fails) -> None:
    assert fails(command).startswith(WITHOUT_EFFECT[command])


CONTRADICTIONS = {
    "train translate --train x --batch-size 64 --batch-tokens 4000":
        "--batch-size 64 and --batch-tokens 4000 contradict each other",
    "train scan --no-bucket --batch-tokens 4000":
        "--batch-tokens 4000 and --no-bucket contradict each other",
    "train chat --corpus english --dialogs x":
        "--corpus english and --dialogs x contradict each other",
    "train reverse --score dot --attn-dim 64":
        "--score dot and --attn-dim 64 contradict each other",
    "train g2p --coverage --score general":
        "--score general and --coverage contradict each other",
    "predict g2p a --beam 2 --nbest 3": "--nbest must be at most beam = 2",
    "predict g2p a --beam 2 --sample": "--sample goes with beam = 1",
    "predict g2p a --beam 2 --nbest-mass 1.5": "--nbest-mass must be above 0 and at most 1",
    "explain g2p a --output x.html --nbest-mass 0": "--nbest-mass must be above 0 and at most 1",
}  # fmt: skip


@pytest.mark.parametrize("command", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_named(command: str, fails: Fails) -> None:
    assert fails(command).startswith(CONTRADICTIONS[command])


@pytest.mark.parametrize(
    "command",
    [
        # The value that asks for nothing is never refused.
        "predict g2p hello --top-k 0 --top-p 1 --coverage-penalty 0 --nbest 1",
        "predict g2p hello --beam 2 --length-penalty gnmt --alpha 0.5",
        "predict g2p hello --scores --length-penalty none",
        "predict g2p hello --sample --seed 3 --temperature 0.7",
        "predict g2p hello --beam 2 --nbest-mass 0.9 --format tsv --with-alignment --strict",
        "predict g2p hello --format text --scores",
    ],
)
def test_options_with_an_effect_are_taken(command: str) -> None:
    assert main(command.split()) == 0


SMALL = ["--hidden", "8", "--embedding", "8", "--max-steps", "1", "--threads", "1"]


def trained(output: Path, *argv: str) -> dict[str, dict[str, object]]:
    """The recipe that a training writes into its checkpoint."""
    assert main(["train", *argv, "--output", str(output), *SMALL]) == 0
    (last,) = (output / "checkpoints").glob("step-0000001*")
    found: dict[str, dict[str, object]] = json.loads((last / "checkpoint.json").read_text())
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.tsv"
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    path.write_text("".join(f"{word} x\t{word} y\n" for word in words))
    return str(path)


WITH_EFFECT = [
    ("--residual", "residual", True),  # the decoder's first layer is as wide as its input
    ("--local predictive --window 3", "window", 3),
    ("--score location --max-source 40", "max_source", 40),
    ("--variational", "variational", True),
    ("--sampling linear --sampling-max 0.3", "sampling_max", 0.3),
    ("--sampling linear --sampling-per example", "sampling_per", "example"),
    ("--coverage-loss 0.5", "coverage_loss", 0.5),
    ("--no-coverage --no-variational --dropout 0", "coverage", False),
    ("--backend eager", "score", "general"),
    ("--no-bucket", "bucket", False),
    ("--tokens chars --min-count 1", "min_count", 1),
    ("--tokens subwords --vocabulary 40", "vocabulary", 40),
]


@pytest.mark.parametrize(("options", "name", "value"), WITH_EFFECT)
def test_training_options_with_an_effect_are_taken(
    options: str, name: str, value: object, tmp_path: Path, pairs: str
) -> None:
    recipe = trained(tmp_path / "run", "pairs", "--train", pairs, *options.split())
    assert {**recipe["model"], **recipe["training"], **recipe["task"]}[name] == value


def test_a_given_batch_size_wins_over_a_recipe_by_symbols(tmp_path: Path, pairs: str) -> None:
    small = ["translate", "--train", pairs, "--vocabulary", "40"]
    recipe = trained(tmp_path / "a", *small, "--batch-size", "16")["training"]
    assert (recipe["batch_size"], recipe["batch_tokens"]) == (16, None)
    recipe = trained(tmp_path / "b", *small)["training"]
    assert (recipe["batch_size"], recipe["batch_tokens"]) == (128, 4000)
    recipe = trained(tmp_path / "c", *small, "--batch-size", "16", "--no-bucket")["training"]
    assert (recipe["batch_size"], recipe["batch_tokens"], recipe["bucket"]) == (16, None, False)


def test_batches_by_symbols_win_over_a_recipe_without_buckets(tmp_path: Path) -> None:
    recipe = trained(tmp_path / "run", "scan", "--batch-tokens", "500")["training"]
    assert (recipe["batch_tokens"], recipe["bucket"]) == (500, True)


def test_a_given_score_wins_over_the_width_of_a_recipe_s_own(tmp_path: Path) -> None:
    model = trained(tmp_path / "run", "reverse", "--score", "dot", "--pairs", "100")["model"]
    assert (model["score"], model["attn_dim"]) == ("dot", None)


def test_a_model_to_start_from_brings_its_subwords(
    tmp_path: Path, pairs: str, fails: Fails
) -> None:
    start = tmp_path / "subwords"
    trained(start, "translate", "--train", pairs, "--dev", pairs, "--vocabulary", "40")
    command = f"train translate --train {pairs} --start-from {start}"
    assert fails(f"{command} --vocabulary 30").startswith("--vocabulary has no effect with --star")


def test_what_the_model_to_start_from_has_counts(tmp_path: Path, pairs: str) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    trained(start, "pairs", "--train", pairs, "--local", "monotonic")
    again = ["pairs", "--train", pairs, "--start-from", str(start), "--window", "3"]
    assert trained(run, *again)["model"]["window"] == 3


def config(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    return str(path)


def test_the_command_line_overrides_a_file_without_contradiction(
    tmp_path: Path, pairs: str
) -> None:
    file = config(
        tmp_path, "task: pairs", f"train: {pairs}", "batch_tokens: 400", "score: concat",
        "attn_dim: 8", "coverage: true", "sampling: linear", "sampling_max: 0.5",
    )  # fmt: skip
    recipe = trained(tmp_path / "a", file)
    assert recipe["training"]["batch_tokens"] == 400 and recipe["model"]["attn_dim"] == 8
    line = ["--batch-size", "16", "--score", "dot", "--sampling", "none"]
    recipe = trained(tmp_path / "b", file, *line)
    assert (recipe["training"]["batch_size"], recipe["training"]["batch_tokens"]) == (16, None)
    assert (recipe["model"]["score"], recipe["model"]["attn_dim"]) == ("dot", None)
    assert recipe["model"]["coverage"] is False
    again = ["train", file, *line, *SMALL, "--output", str(tmp_path / "b"), "--resume"]
    assert main(again) == 0


def test_a_corpus_on_the_command_line_replaces_the_dialogs_of_a_file(tmp_path: Path) -> None:
    file = config(tmp_path, "task: chat", "dialogs: x.txt", "output: d", "lr: 0.5")
    assert (parse(["train", file]).dialogs, parse(["train", file]).corpus) == ("x.txt", None)
    args = parse(["train", file, "--corpus", "korean", "--lr", "0.1"])
    assert (args.dialogs, args.corpus, args.lr, str(args.output)) == (None, "korean", 0.1, "d")


def test_a_file_is_held_to_the_rules_as_well(tmp_path: Path, fails: Fails) -> None:
    file = config(tmp_path, "task: scan", "batch_size: 8", "recipe: {batch_tokens: 400}")
    assert fails(f"train {file}").startswith("--batch-size 8 and --batch-tokens 400 contradict")
    file = config(tmp_path, "task: scan", "window: 8")
    assert fails(f"train {file}").startswith("--window has no effect without --local")
    assert fails(f"train {file} --epochs 2").startswith("--window has no effect without --local")
    file = config(tmp_path, "task: spin")
    assert fails(f"train {file}").startswith("TASK must be one of g2p, scan, reverse, pairs")
    file = config(tmp_path, "task: scan", "help: true")
    assert fails(f"train {file}").endswith("there is no option --help")


def test_resume_takes_no_other_model_and_no_other_data(
    tmp_path: Path, pairs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = ["translate", "--train", pairs, "--vocabulary", "40"]
    trained(run, *small)
    resume = ["train", *small, "--output", str(run), "--resume"]
    assert main([*resume, "--batch-tokens", "4000"]) == 0
    capfd.readouterr()
    for option in (["--seed", "2"], ["--score", "dot"], ["--max-length", "9"], ["--hidden", "12"]):
        assert main([*resume, *option]) == 2
        assert f"{option[0]} is not that of the run in" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "predict --scores -- g2p -x --y",
        "predict g2p --scores -- -x --y",
        "predict g2p -- -x --y --scores",
        "predict -- g2p -x --y",
    ],
)
def test_what_follows_two_dashes_is_no_option(words: str) -> None:
    args = parse(words.split())
    expected = ["-x", "--y", "--scores"] if words.endswith("--scores") else ["-x", "--y"]
    assert str(args.model) == "g2p" and args.text == expected
    assert args.scores is ("--scores --" in words)


def test_dashes_in_other_commands(tmp_path: Path) -> None:
    args = parse(["explain", "--output", str(tmp_path / "e.html"), "--", "g2p", "--hello"])
    assert args.text == "--hello" and args.output == tmp_path / "e.html"


def test_options_that_are_repeated_add_up(tmp_path: Path) -> None:
    file = config(tmp_path, "task: reverse", "output: o", "teacher: a")
    args = parse(["train", file, "--teacher", "b", "--teacher", "c"])
    assert [str(teacher) for teacher in args.teacher] == ["a", "b", "c"]


def test_an_option_for_attention_needs_some(tmp_path: Path, fails: Fails) -> None:
    assert "has no effect" in fails("predict g2p hello --replace-unknown")
    none = tmp_path / "none"
    lines = tmp_path / "lines.tsv"
    lines.write_text("a b\tb a\nb a\ta b\nb b\tb b\na a\ta a\n")
    common = f"--train {lines} --dev {lines} --hidden 8 --embedding 8 --max-steps 1"
    assert main(f"train pairs {common} --score none --output {none}".split()) == 0
    assert "coverage-penalty has no effect: the model has no attention" in fails(
        f"predict {none} a --beam 2 --coverage-penalty 1"
    )
    file = config(tmp_path, "task: pairs", f"train: {lines}", "coverage_loss: 0.5", "hidden: 8")
    output = tmp_path / "new"
    found = fails(f"train {file} --score none --output {output}")
    assert found.startswith("--coverage-loss needs a --score other than none")
    assert not output.exists()
