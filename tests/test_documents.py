"""The claims of the documents: features have tests, adapters exist, links and commands work."""

from __future__ import annotations

import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn import interop, seq2seq
from fused_attn.cli import main, parse

ROOT = Path(__file__).resolve().parent.parent
FEATURES = ROOT / "docs" / "features.md"
INTEROP = ROOT / "docs" / "interop.md"
SURVEY = ROOT.parent / "shared" / "research" / "peers.md"


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without headers; ``\\|`` is a bar within a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [
        [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]
    rules = [at for at, row in enumerate(cells) if set("".join(row)) <= set("-:")]
    headers = {at - 1 for at in rules} | set(rules)
    return [row for at, row in enumerate(cells) if at not in headers]


FEATURE_ROWS = rows_of(FEATURES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", FEATURE_ROWS, ids=lambda row: row[0])
def test_a_feature_has_a_test_or_a_reason(row: list[str]) -> None:
    name, others, here, how = row
    assert name and others and here in ("yes", "partly", "no")
    cited = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", how)
    assert bool(cited) == (here != "no"), "a feature cites tests if and only if it exists"
    for file, function in cited:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {function}\(", source, re.MULTILINE), function
    if here != "yes":
        reason = re.sub(r"\(`.*?`\)|`", "", how)
        assert len(reason.split()) >= 6, "a missing or partial feature must have a reason"


def test_every_row_of_the_survey_is_there() -> None:
    if not SURVEY.exists():
        pytest.skip("the survey of other toolkits is not next to this checkout")
    text = SURVEY.read_text(encoding="utf-8")
    tables = text[text.index("### 1a.") : text.index("### 1d.")]
    # One name contains |v|, whose bars do not separate cells.
    lines = tables.replace("v/|v|", "v/\\|v\\|")
    surveyed = [row[0] for row in rows_of(lines)]
    assert len(surveyed) > 40
    assert [row[0] for row in FEATURE_ROWS] == surveyed


def test_every_adapter_is_in_the_table() -> None:
    """With the argument names of its constructor, in order."""
    text = INTEROP.read_text(encoding="utf-8")
    adapters = [name for name in interop.__all__ if hasattr(getattr(interop, name), "peer")]
    assert len(adapters) >= 14
    for name in adapters:
        wanted = list(inspect.signature(getattr(interop, name)).parameters)
        found = re.findall(rf"`interop\.{name}\((.*?)\)`", text)
        assert len(found) == 1, name
        named = found[0].split(", ")
        assert named == wanted[: len(named)] and len(wanted) - len(named) <= 1, name


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_toolkit_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(ROOT / "docs/toolkit.md", "python")
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("attention\nworld\n")
    exec(compile(code, "toolkit.md", "exec"), {})
    nbest, *streamed, measures = capsys.readouterr().out.splitlines()
    assert nbest.count("(") == 3 and "HH EH L OW" in nbest
    assert streamed == ["AH T EH N SH AH N", "W ER L D"]
    assert measures == "{'WER': 0.5, 'PER': 0.125}"


def test_the_toolkit_s_output_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/toolkit.md").read_text(encoding="utf-8")
    typed, *shown = re.findall(r"^(?:\$ printf|\{).*", text, re.MULTILINE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nsnake_case\n"))
    assert typed == r"$ printf 'hello\nsnake_case\n' | fused-attn predict g2p --format json"
    assert main(typed.partition("fused-attn ")[2].split()) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [json.loads(line) for line in shown]
    for each, other in zip(records, expected, strict=True):
        for found, wanted in zip(each["targets"], other["targets"], strict=True):
            for name in ("log_prob", "token_log_probs"):  # the last digits depend on the processor
                assert found.pop(name) == pytest.approx(wanted.pop(name), abs=1e-4)
    assert records == expected


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "python"))
def test_the_readme_in_python(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block runs, and prints what its comments say."""
    if "interop" in code:
        pytest.skip("its model is the reader's; tests/test_interop_swap.py has such models")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for line in code.splitlines():
        shown = line.partition("  # ")[2] if line.startswith("print(") else ""
        if line.endswith(":") or not shown or shown.startswith("the "):
            continue
        assert shown.partition(", the ")[0].partition(": ")[0].strip("()") in printed, line


def test_the_own_training_loop(tmp_path: Path) -> None:
    """A loop in plain torch around the toolkit's model learns what it has not seen."""
    command = [sys.executable, str(ROOT / "examples/own_training_loop.py"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    wrong = re.search(r"'lines wrong': '([0-9.]+) %'", done.stdout)
    assert wrong and float(wrong[1]) < 20
    assert "Prediction('seven hundred five'" in done.stdout
    found = seq2seq.load(tmp_path / "model")([tuple("42")])
    assert found[0].text == "forty two"


def test_the_toolkit_s_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks(ROOT / "docs/toolkit.md", "yaml")
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    args = parse(["train", "config.yaml", "--lr", "0.5"])
    assert (args.task, args.score, args.batch_tokens, args.lr) == ("translate", "concat", 4000, 0.5)
    assert args.input_feeding is True and args.patience == 3


COMMANDS = [
    line.partition(" #")[0].replace("torchrun --nproc_per_node=2 -m fused_attn", "fused-attn")
    for page in (ROOT / "README.md", ROOT / "docs/toolkit.md")
    for block in blocks(page, "")
    for line in block.splitlines()
    if line.startswith(("fused-attn", "torchrun"))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    """Every command in the documents uses existing options."""
    words = shlex.split(command)[1:]
    if "config.yaml" not in words:  # which has its own test
        parse(words)
