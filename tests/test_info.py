"""`fused_attn.info`: its report is correct, and never fails because something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import backends, info
from fused_attn.backends.triton import interpreter
from fused_attn.problem import AttentionProblem


def run_info(**environment: str) -> str:
    command = [sys.executable, "-m", "fused_attn.info"]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def test_facts_are_plain_values() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["fused_attn"] == fused_attn.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert list(facts["backends"]) == list(backends.BACKENDS)
    assert facts["backends"]["eager"] == []


def test_instruction_set_is_one_that_is_supported() -> None:
    native = pytest.importorskip("fused_attn._C", exc_type=ImportError)
    instruction_set = info.collect()["instruction_set"]
    assert instruction_set["in_use"] == native.cpu_isa()
    assert instruction_set["in_use"] in instruction_set["supported"]
    assert instruction_set["supported"][-1] == "generic"


def test_report_names_what_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main() == 0
    report = capsys.readouterr().out
    for line in (f"torch {torch.__version__}", f"fused_attn {fused_attn.__version__}"):
        assert line in " ".join(report.split())
    assert "eager   usable" in report
    for variable in info.ENVIRONMENT:
        assert variable in report


def test_several_lines_of_a_reason_stay_under_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {name: [] for name in backends.BACKENDS}
    reasons["cpu"] = ["no module: compiling failed\n  error: expected ';'"]
    monkeypatch.setattr(backends, "unavailable_reasons", reasons.__getitem__)
    lines = info.report().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  cpu"))
    assert lines[at] == "  cpu     not usable: no module: compiling failed"
    assert lines[at + 1] == "            error: expected ';'"
    assert lines[at + 2] == "  cuda    usable"


def test_report_shows_the_environment_and_a_forced_instruction_set() -> None:
    pytest.importorskip("fused_attn._C", exc_type=ImportError)
    report = run_info(FUSED_ATTN_CPU_ISA="generic", FUSED_ATTN_BACKEND="eager")
    assert "instruction set  generic" in report
    assert "FUSED_ATTN_BACKEND  eager" in report
    assert "FUSED_ATTN_CPU_ISA  generic" in report


def test_report_survives_an_impossible_instruction_set() -> None:
    pytest.importorskip("fused_attn._C", exc_type=ImportError)
    report = run_info(FUSED_ATTN_CPU_ISA="abacus")
    assert "instruction set  none" in report
    assert "not usable: the environment variable FUSED_ATTN_CPU_ISA" in report


def test_report_survives_a_missing_native_module() -> None:
    code = (
        "import sys; sys.modules['fused_attn._C'] = None\n"
        "from fused_attn import info\n"
        "print(info.report())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "instruction set  none" in done.stdout
    assert "cpu     not usable: the native module" in done.stdout
    assert "eager   usable" in done.stdout


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            {"missing": None, "toolkit": "13.0", "architectures": ["80-real", "90"]},
            "native CUDA      toolkit 13.0, for 80-real, 90",
        ),
        (
            {"missing": "no nvcc", "toolkit": None, "architectures": []},
            "native CUDA      none: no nvcc",
        ),
    ],
    ids=["with", "without"],
)
def test_report_says_what_the_native_module_has_of_cuda(
    facts: dict[str, object], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = pytest.importorskip("fused_attn._C", exc_type=ImportError)
    monkeypatch.setattr(native, "cuda_build", lambda: facts)
    assert info.collect()["native_cuda"] == facts
    assert line in info.report().splitlines()


def test_the_readme_has_the_table_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is the one without Triton's interpreter, on any machine."""
    monkeypatch.setattr(interpreter, "INTERPRETED", False)
    readme = Path(__file__).parent.parent / "README.md"
    assert info.support_table() in readme.read_text(encoding="utf-8")


def test_a_table_says_what_a_call_would_find(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(problem: AttentionProblem) -> list[str]:
        refused = problem.queries > 3 or problem.dtype == torch.float64 or problem.windowed
        return ["asleep", *(["too much"] if refused else [])]

    eager = backends.load("eager")
    monkeypatch.setattr(eager, "unavailable_reasons", lambda: ["asleep"])
    monkeypatch.setattr(eager, "not_supported_reasons", reasons)
    row = "| `eager` | any | float32, bfloat16, float16 | yes | yes | no | yes | up to 3 | any |"
    assert info.support_table().splitlines()[-1] == row
