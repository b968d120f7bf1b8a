"""The help of the command: which options it shows, and their defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_attn.cli import main

OPTIONS = json.loads(
    (Path(__file__).parent / "data/before_rooms/options.json").read_text(encoding="utf-8")
)
TEXT = {"tokens", "vocabulary", "min-count", "max-length", "skip-bad"}
SINCE = {"source-tokens", "target-tokens"}  # options that came later
SEARCH_SINCE = {"nbest-mass", "compute"}
OUTPUT_SINCE = {"format", "with-alignment", "strict"}  # of predict
SEARCHING = ("predict", "evaluate", "explain", "chat")
PAIRS = {"train", "dev", "test"} | TEXT | SINCE
OWN = {
    "g2p": {"limit-words", "lexicon", "test"},
    "scan": {"split", "test"},
    "reverse": {"numbers", "pairs", "longest", "test-longest"},
    "pairs": PAIRS,
    "translate": PAIRS,
    "chat": {"corpus", "dialogs"} | TEXT,
}
# Of the recipes, most where the tasks differ.
DEFAULTS: dict[str, dict[str, str | None]] = {
    "g2p": {"hidden": "256", "embedding": "64", "batch-size": "128", "lr": "0.002"},
    "scan": {"hidden": "128", "batch-size": "64", "epochs": "10", "split": "simple"},
    "reverse": {"score": "concat", "attn-dim": "128", "epochs": "4", "numbers": "51"},
    "pairs": {"hidden": "256", "tokens": "words", "max-length": "200", "batch-tokens": None},
    "translate": {
        "hidden": "512", "batch-tokens": "4000", "batch-size": "--batch-tokens",
        "tokens": "subwords", "max-length": "100", "input-feeding": "yes",
    },
    "chat": {"batch-size": "64", "vocabulary": "4000", "max-length": "80", "skip-bad": "yes"},
}  # fmt: skip

Help = Callable[..., str]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Help:
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 0
        return capsys.readouterr().out

    return shown


def options_of(text: str) -> dict[str, str]:
    """The options that a help text lists, with what it says of each."""
    text = re.sub(r"\n {10,}", " ", text)
    found = re.findall(r"^  (?:-h, )?--(?:\[no-\])?([a-z0-9-]+) *(.*)", text, re.MULTILINE)
    assert len(dict(found)) == len(found), "an option is listed twice"
    return dict(found)


def every_option(command: str) -> set[str]:
    """All options that a command has had since before there were --help-all and --[no-]."""
    names = {name[2:] for name in OPTIONS[command] if name.startswith("--")}
    names = {name for name in names if not name.startswith("no-")} | {"help-all"}
    if command in SEARCHING:
        names |= SEARCH_SINCE | (OUTPUT_SINCE if command == "predict" else set())
    return names | SINCE if command == "train" else names


@pytest.mark.parametrize("task", OWN)
def test_the_help_of_a_task_has_its_options_and_defaults(task: str, help_of: Help) -> None:
    short = options_of(help_of("train", task, "--help"))
    others = set().union(*OWN.values()) - OWN[task]
    assert short.keys() >= OWN[task] | {"output", "hidden", "epochs", "lr"}
    assert not short.keys() & others
    whole = options_of(help_of("train", task, "--help-all"))
    assert whole.keys() == every_option("train") - others
    for name, value in DEFAULTS[task].items():
        default = re.search(r"\(default: (.*)\)", whole[name])
        assert (default and default[1]) == value, name


@pytest.mark.parametrize("task", OWN)
def test_what_people_seldom_need_is_left_to_help_all(task: str, help_of: Help) -> None:
    text = help_of("train", task, "--help")
    assert not options_of(text).keys() & {"attn-dim", "window", "rdrop", "warmup", "teacher"}
    left_out = options_of(help_of("train", task, "--help-all")).keys() - options_of(text).keys()
    assert f"fused-attn train {task} --help-all shows {len(left_out)} more options" in text
    assert text.count("\n") < 60


def test_the_help_without_a_task_lists_the_tasks(help_of: Help) -> None:
    text = help_of("train", "--help")
    for task in OWN:
        assert len(re.findall(rf"^  {task}  .*", text, re.MULTILINE)) == 1
    assert "train TASK --help" in text
    assert options_of(text).keys() == {
        "output", "resume", "start-from", "hidden", "epochs", "lr", "seed", "device", "threads",
        "help", "help-all",
    }  # fmt: skip
    assert text.count("\n") < 50
    whole = options_of(help_of("train", "--help-all"))
    assert whole.keys() == every_option("train")
    assert "pairs, translate: " in whole["train"] and "depends on the task" in whole["hidden"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--help", "translate"],
        ["--epochs", "3", "translate", "-h"],
        ["--start-from", "g2p", "translate", "--help"],
        ["config.yaml", "--help"],
        ["--no-bucket", "config.yaml", "--help"],
    ],
)
def test_help_finds_the_task(
    argv: list[str], help_of: Help, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("task: translate\nhidden: 64\n")
    assert help_of("train", *argv) == help_of("train", "translate", "--help")


@pytest.mark.parametrize("command", SEARCHING)
def test_a_search_s_seldom_options_are_in_help_all(command: str, help_of: Help) -> None:
    text = help_of(command, "--help")
    short, whole = options_of(text), options_of(help_of(command, "--help-all"))
    assert {"beam", "max-length", "sample"} <= short.keys()
    assert {"alpha", "temperature", "block-ngrams"} <= whole.keys() - short.keys()
    unused = {"nbest", "nbest-mass"} if command in ("evaluate", "chat") else set()
    assert whole.keys() == every_option(command) - unused
    assert text.count("\n") < 45


@pytest.mark.parametrize("command", ["info", "aer", "curves", "export"])
def test_commands_of_few_options_show_all(command: str, help_of: Help) -> None:
    assert options_of(help_of(command, "--help")).keys() == every_option(command) - {"help-all"}
