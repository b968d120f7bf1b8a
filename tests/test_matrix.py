"""The script that runs tests with several versions: its choices and its report."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import matrix
import pytest
from matrix import Combination, NotRun, Outcome

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_versions_supported_are_in_the_matrix() -> None:
    combinations = list(map(Combination.parse, matrix.COMBINATIONS))
    (torch,) = PROJECT["dependencies"]
    oldest = torch.removeprefix("torch>=")
    assert Combination(PROJECT["requires-python"].removeprefix(">="), f"{oldest}.0") in combinations
    pythons = {
        name.rpartition(" ")[2]
        for name in PROJECT["classifiers"]
        if name.startswith("Programming Language :: Python :: 3.")
    }
    assert pythons == {combination.python for combination in combinations}


def test_the_torch_of_make_setup_is_in_the_matrix() -> None:
    if not (ROOT / "Makefile").exists():
        pytest.skip("no Makefile")
    (pinned,) = [
        line.partition("= ")[2].removeprefix("torch==")
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("TORCH =")
    ]
    torches = [Combination.parse(text).torch for text in matrix.COMBINATIONS]
    assert torches.count(pinned) == 3, "every Python is tested with it"


def test_which_tests() -> None:
    names = {path.stem for path in matrix.test_files()}
    assert {"test_ops", "test_attention", "test_native_tensors", "test_seq2seq_search"} <= names
    assert not names & {"test_matrix", "test_packaging", "test_seq2seq_shipped"}
    every = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    for start in matrix.LEFT_OUT:
        assert any(name.startswith(f"test_{start}") for name in every), f"{start} names no test"


def test_a_python_is_found_or_the_reason_is_given(tmp_path: Path) -> None:
    assert matrix.version_of(matrix.find_python(HERE, [])) == HERE
    other = tmp_path / "python9.9"
    other.write_text("#!/bin/sh\necho 9.9\n", encoding="utf-8")
    other.chmod(0o755)
    assert matrix.find_python("9.9", [str(other)]) == str(other)
    with pytest.raises(NotRun, match=r"no python9\.8 on PATH or from pyenv"):
        matrix.find_python("9.8", [str(other), str(tmp_path / "missing")])


def test_a_step_that_fails_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    code = "print('ERROR: no such release'); print('more'); raise SystemExit(3)"
    with pytest.raises(NotRun, match=r"installing failed: ERROR: no such release \(a\.log\)"):
        matrix.run(tmp_path / "a.log", "installing", [sys.executable, "-c", code])


def test_what_cannot_be_had_and_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing release of torch is not a failure; a package that does not build is."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "WORK", tmp_path)
    failing = ""

    def run(log: Path, step: str, command: Sequence[str | Path], **env: str) -> None:
        if step == failing:
            raise NotRun(f"{step} failed")

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix, "copy_sources", lambda: tmp_path)
    combination = Combination(HERE, "2.13.0")
    for step, status in (("installing torch", 0), ("building the wheel", 1)):
        failing = step
        outcome = matrix.run_combination(combination, [], [])
        assert f"{step} failed" in outcome.words
        assert (matrix.exit_status([outcome], strict=False), outcome.ran) == (status, bool(status))


def test_what_pytest_reports_is_read(tmp_path: Path) -> None:
    test = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip()\n"
    for extra, words, ok in (
        ("", "1 passed, 0 failed, 1 skipped", True),
        ("def test_c(): assert 0\n", "1 passed, 1 failed, 1 skipped", False),
        ("def test_d(none): pass\n", "1 passed, 1 failed, 1 skipped", False),
    ):
        file = tmp_path / "test_it.py"
        file.write_text(test + extra, encoding="utf-8")
        results = tmp_path / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
        subprocess.run([*command, f"--junitxml={results}"], cwd=tmp_path, capture_output=True)
        assert matrix.read_results(results) == Outcome(words, ok)


@pytest.mark.parametrize(
    ("outcome", "lenient", "strict"),
    [
        (Outcome("5 passed", ok=True), 0, 0),
        (Outcome("1 failed", ok=False), 1, 1),
        (Outcome("not run: no python", ok=True, ran=False), 0, 1),
    ],
)
def test_the_exit_status(
    outcome: Outcome, lenient: int, strict: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_one(
        combination: Combination, pythons: Sequence[str], options: Sequence[str]
    ) -> Outcome:
        return outcome

    assert matrix.main(["3.11/2.13.0"], run_one) == lenient
    assert matrix.main(["3.11/2.13.0", "--strict"], run_one) == strict
    assert f"Python 3.11, torch 2.13.0: {outcome.words}" in capsys.readouterr().out


def test_a_combination_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["3.11"])
    assert "a combination is like 3.11/2.13.0, got '3.11'" in capsys.readouterr().err
