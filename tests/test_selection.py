"""Backend selection: a named backend never falls back, and errors list all reasons."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from fused_attn import LuongAttention, backends, functional
from fused_attn.problem import AttentionProblem

CPU_REASONS = backends.unavailable_reasons("cpu")
ON_CPU = tuple(
    name
    for name in backends.BACKENDS
    if not any(
        reason.endswith("not on cpu")
        for reason in backends.load(name).not_supported_reasons(
            AttentionProblem("dot", 1, 1, 1, 1, 1)
        )
    )
)
needs_cpu = pytest.mark.skipif(bool(CPU_REASONS), reason=f"cpu: {'; '.join(CPU_REASONS)}")


@pytest.fixture(autouse=True)
def _fresh_selection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolate each test from the cached choice and the environment variable."""
    monkeypatch.delenv("FUSED_ATTN_BACKEND", raising=False)
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, *reasons: str) -> None:
    monkeypatch.setattr(backends.load(name), "not_supported_reasons", lambda problem: [*reasons])


def select(requested: str = "auto", dtype: torch.dtype = torch.float32) -> ModuleType:
    return backends.select("cpu", dtype, "dot", requested)


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Record the operations that the backend ``name`` runs from now on."""
    backend, calls = backends.load(name), []

    def recorded(operation: str) -> Callable[..., object]:
        run = getattr(backend, operation)
        return lambda *arguments: (calls.append(operation), run(*arguments))[1]

    for operation in ("dot_forward", "dot_backward", "concat_forward", "concat_backward"):
        monkeypatch.setattr(backend, operation, recorded(operation))
    return calls


@needs_cpu
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_auto_takes_native_code_where_it_can(dtype: torch.dtype) -> None:
    assert select("auto", dtype) is backends.load("cpu")


def test_auto_takes_the_next_backend_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "cpu", "no SIMD today")
    assert select() is backends.load("eager")


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_request_takes_that_backend_or_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ON_CPU and not backends.unavailable_reasons(name):
        assert select(name) is backends.load(name)
        backends.select.cache_clear()
    refuse(monkeypatch, name, "it is too hot", "it is too late")
    with pytest.raises(ValueError, match="no backend can do dot attention on cpu in float32") as e:
        select(name)
    message = str(e.value)
    assert f"(backend='{name}')" in message
    assert f"{name}: it is too hot; it is too late" in message
    others = set(backends.BACKENDS) - {name}
    assert not any(f"{other}:" in message for other in others)


def test_a_failed_auto_lists_every_reason_of_every_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in backends.BACKENDS:
        refuse(monkeypatch, name, f"{name} is asleep", f"{name} is tired")
    with pytest.raises(ValueError, match=r"backend='auto'") as error:
        select()
    for name in backends.BACKENDS:
        assert f"  {name}: {name} is asleep; {name} is tired" in str(error.value).splitlines()


def test_the_refusal_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "cpu", "no SIMD today")
    query, memory = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    functional.dot_attention(query, memory)
    with pytest.raises(ValueError, match=re.escape("cpu: no SIMD today")):
        functional.dot_attention(query, memory, backend="cpu")


def test_an_unknown_name_lists_the_known_ones() -> None:
    query, memory = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    names = ", ".join(map(repr, ("auto", *backends.BACKENDS)))
    for call in (
        lambda: functional.dot_attention(query, memory, backend="cpuu"),
        lambda: LuongAttention(4, backend="cpuu"),
        lambda: backends.check_request("cpuu"),
    ):
        with pytest.raises(ValueError, match=f"backend must be one of {names}, got 'cpuu'"):
            call()


@pytest.mark.parametrize("name", [n for n in ON_CPU if n != "cpu"] + ["auto", ""])
def test_environment_decides_for_auto(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = select(name or "auto")
    backends.select.cache_clear()
    monkeypatch.setenv("FUSED_ATTN_BACKEND", name)
    assert select() is expected


@needs_cpu
def test_environment_yields_to_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "eager")
    assert select("cpu") is backends.load("cpu")


def test_environment_never_falls_back_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "cpu")
    refuse(monkeypatch, "cpu", "no SIMD today")
    with pytest.raises(ValueError, match=re.escape("(backend='cpu')")):
        select()


def test_an_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="the environment variable FUSED_ATTN_BACKEND must be one"):
        select()


def test_environment_in_a_new_process() -> None:
    code = (
        "import torch; from fused_attn import backends\n"
        "print(backends.select('cpu', torch.float32, 'dot').__name__)"
    )
    environment = os.environ | {"FUSED_ATTN_BACKEND": "eager"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["fused_attn.backends.eager"]


@pytest.mark.parametrize("name", ON_CPU)
def test_the_backend_asked_for_is_the_one_that_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and backward, for all scores: a backend's tests must not run another backend."""
    if reasons := backends.unavailable_reasons(name):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    ran = {other: calls_of(monkeypatch, other) for other in backends.BACKENDS}
    for score in ("dot", "general", "concat"):
        module = LuongAttention(4, score=score, backend=name)
        query, memory = torch.ones(1, 2, 4, requires_grad=True), torch.ones(1, 3, 4)
        module(query, memory)[0].sum().backward()
    twice = ["dot_forward", "dot_backward"] * 2
    assert ran.pop(name) == [*twice, "concat_forward", "concat_backward"]
    assert not any(ran.values())


def test_the_choice_is_made_once_per_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        backends.load("eager"), "not_supported_reasons", lambda problem: asked.append(problem) or []
    )
    for _ in range(3):
        select("eager")
        select("eager", torch.bfloat16)
    assert [problem.dtype for problem in asked] == [torch.float32, torch.bfloat16]


@needs_cpu
@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        (torch.float32, "cuda", "it runs on the cpu, not on cuda"),
        (torch.int32, "cpu", "dtype torch.int32 is not one of float32, float64, bfloat16, float16"),
    ],
)
def test_what_the_cpu_backend_refuses(dtype: torch.dtype, device: str, message: str) -> None:
    problem = AttentionProblem("dot", 1, 1, 1, 1, 1, dtype, device)
    assert backends.load("cpu").not_supported_reasons(problem) == [message]


def test_eager_refuses_what_has_no_softmax() -> None:
    problem = AttentionProblem("dot", 1, 1, 1, 1, 1, torch.int64)
    (reason,) = backends.load("eager").not_supported_reasons(problem)
    assert reason == "dtype torch.int64 is not a floating-point type"


@needs_cpu
def test_a_forced_instruction_set_is_the_one_in_use() -> None:
    """Uses the smallest instruction set, which is never the default if there is a choice."""
    narrowest = backends.load("cpu").native.cpu_isas_supported()[-1]
    found = run_with_isa(narrowest)
    assert (found.returncode, found.stdout.strip()) == (0, narrowest), found.stderr


@needs_cpu
def test_an_impossible_instruction_set_fails_loudly() -> None:
    found = run_with_isa("avx1024")
    assert found.returncode != 0
    assert "the environment variable FUSED_ATTN_CPU_ISA must be one of" in found.stderr
    assert "got 'avx1024'" in found.stderr


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch; from fused_attn import _C, functional\n"
        "functional.dot_attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4))\n"
        "print(_C.cpu_isa())"
    )
    environment = os.environ | {"FUSED_ATTN_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_missing_native_module_leaves_eager() -> None:
    code = (
        "import sys; sys.modules['fused_attn._C'] = None\n"
        "import torch; from fused_attn import backends, functional\n"
        "functional.dot_attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4))\n"
        "print(backends.select('cpu', torch.float32, 'dot').__name__)\n"
        "functional.dot_attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4), backend='cpu')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["fused_attn.backends.eager"]
    assert "ValueError: no backend can do dot attention on cpu in float32" in found.stderr
    assert "cpu: the native module fused_attn._C is not there" in found.stderr


@pytest.mark.parametrize(
    ("score", "dtype", "queries", "width", "flags", "expected"),
    [
        ("dot", torch.bfloat16, 1, 512, {}, "cuda"),
        ("dot", torch.bfloat16, 2, 512, {}, "triton"),
        ("dot", torch.bfloat16, 2, 1024, {}, "cuda"),
        ("general", torch.float16, 5, 1024, {}, "triton"),
        ("dot", torch.float32, 4, 512, {}, "cuda"),
        ("dot", torch.float32, 64, 512, {}, "eager"),
        ("dot", torch.float32, 64, 512, {"backward": True}, "eager"),
        ("dot", torch.bfloat16, 64, 512, {"backward": True}, "triton"),
        ("dot", torch.bfloat16, 1, 512, {"windowed": True}, "triton"),
        ("dot", torch.bfloat16, 64, 512, {"windowed": True}, "eager"),
        ("concat", torch.float32, 64, 512, {}, "triton"),
        ("concat", torch.bfloat16, 5, 512, {"prepared": True}, "cuda"),
        ("concat", torch.bfloat16, 5, 1024, {"prepared": True}, "triton"),
    ],
)
def test_auto_on_a_gpu_goes_by_what_was_measured(
    score: str,
    dtype: torch.dtype,
    queries: int,
    width: int,
    flags: dict[str, bool],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cases are rows of benchmarks/results/nvidia-h200. A named backend runs in any case."""
    pytest.importorskip("triton")
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.load(name), "unavailable_reasons", list)
    sizes = (queries, width, width)
    assert backends.select("cuda", dtype, score, sizes=sizes, **flags) is backends.load(expected)
    asked = backends.select("cuda", dtype, score, "triton", sizes, **flags)
    assert asked is backends.load("triton")


def test_the_slower_backend_is_taken_where_no_other_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load("triton"), "unavailable_reasons", list)
    refuse(monkeypatch, "eager", "it is too hot")
    found = backends.select("cuda", torch.float32, "dot", sizes=(64, 512, 512))
    assert found is backends.load("triton")
