"""The CUDA backend without a GPU: what it refuses and why, and what its parts decide."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import cuda_on_host
import pytest
import torch
from cuda_on_host import Params, Plan

from fused_attn import backends
from fused_attn.backends import cuda
from fused_attn.problem import AttentionProblem

needs_compiler = pytest.mark.skipif(not cuda_on_host.COMPILER, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh_reasons() -> Iterator[None]:
    cuda.unavailable_reasons.cache_clear()
    yield
    cuda.unavailable_reasons.cache_clear()


class Native:
    """A native module that was built with CUDA, or for `missing`, without."""

    def __init__(self, missing: str | None = None) -> None:
        self.missing = missing

    def cuda_build(self) -> dict[str, Any]:
        architectures = [] if self.missing else ["80-real", "90", "120"]
        return {"missing": self.missing, "toolkit": None, "architectures": architectures}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that GPUs of these compute capabilities are there."""

    def pretend(*capabilities: tuple[int, int], missing: str | None = None) -> None:
        monkeypatch.setattr(cuda, "native", Native(missing))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Model {number}")

    return pretend


def refusals(**fields: Any) -> list[str]:
    usual = {"score": "dot", "batch": 1, "queries": 1, "source": 1, "memory_dim": 64}
    usual |= {"score_dim": 64, "device_type": "cuda"}
    return cuda.not_supported_reasons(AttentionProblem(**usual | fields))


def test_why_it_is_unavailable(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(missing="no CUDA compiler (nvcc) was found")
    (reason,) = cuda.unavailable_reasons()
    assert reason == ("the native module was built without CUDA: no CUDA compiler (nvcc) was found")
    cuda.unavailable_reasons.cache_clear()
    gpu()
    assert cuda.unavailable_reasons() == ["torch finds no CUDA GPU"]
    cuda.unavailable_reasons.cache_clear()
    gpu((9, 0), (7, 5))
    (reason,) = cuda.unavailable_reasons()
    assert "GPU 1 (Model 1) has the compute capability 7.5" in reason and "80-real, 90" in reason
    cuda.unavailable_reasons.cache_clear()
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    (reason,) = cuda.unavailable_reasons()
    assert reason.endswith("is built without CUDA")
    cuda.unavailable_reasons.cache_clear()
    monkeypatch.setattr(cuda, "native", None)
    monkeypatch.setattr(cuda, "_import_error", "no such file", raising=False)
    assert "fused_attn._C is not there: no such file" in cuda.unavailable_reasons()[0]


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (["80-real"], [(8, 0), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["80-real", "90"], [(8, 6), (9, 0), (10, 3), (12, 0)], [(7, 5)]),
        (["90-virtual"], [(9, 0), (12, 1)], [(8, 9)]),
        (["90a-real"], [(9, 0)], [(8, 0), (10, 0)]),
        (["native"], [(8, 0), (9, 0)], []),
    ],
    ids=lambda value: "-".join(value) if value and isinstance(value[0], str) else None,
)
def test_which_gpus_an_architecture_runs_on(
    architectures: list[str], runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(cuda.can_run(capability, architectures) for capability in runs)
    assert not any(cuda.can_run(capability, architectures) for capability in does_not)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device_type": "cpu"}, "it runs on cuda, not on cpu"),
        ({"dtype": torch.float64}, "dtype torch.float64 is not one of float32, bfloat16, float16"),
        ({"backward": True}, "it has no backward: it is for decoding, one step at a time"),
        ({"queries": 9}, "it takes up to 8 queries, not 9"),
        ({"memory_dim": 2049}, "the memory is 2049 wide, and it takes up to 2048"),
        ({"score_dim": 4096}, "the score is 4096 wide, and it takes up to 2048"),
        ({"score": "concat"}, "concat needs a prepared memory, with its exponentials"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_it_refuses(fields: dict[str, Any], reason: str, gpu: Callable[..., None]) -> None:
    gpu((9, 0))
    assert refusals(**fields) == [reason]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_it_takes(dtype: torch.dtype, gpu: Callable[..., None]) -> None:
    gpu((9, 0), (12, 0))
    largest = {"queries": 8, "memory_dim": 2048, "score_dim": 2048, "dtype": dtype}
    assert refusals(**largest) == []
    assert refusals(**largest, score="concat", prepared=True) == []


@pytest.mark.parametrize("others", [[], ["triton is not here"]], ids=["triton", "eager"])
def test_auto_prefers_it_and_leaves_the_backward_to_others(
    others: list[str], gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    monkeypatch.setattr(backends.load("triton"), "not_supported_reasons", lambda problem: others)
    backends.select.cache_clear()
    call = ("cuda", torch.bfloat16, "dot", "auto")
    rest = backends.load("eager" if others else "triton")
    assert backends.select(*call, (1, 64, 64)) is cuda
    assert backends.select(*call, (1, 64, 64), backward=True) is rest
    assert backends.select(*call, (20, 64, 64)) is rest
    backends.select.cache_clear()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_on_host.library(tmp_path_factory.getbasetemp())


def plan(library: ctypes.CDLL, multiprocessors: int = 132, **sizes: int) -> Plan:
    usual = {"B": 8, "T": 1, "S": 512, "E": 512, "K": 512, "dtype": 2}
    params = Params(**usual | sizes)
    return cuda_on_host.Call(library, multiprocessors).plan(params)


@needs_compiler
def test_plans(library: ctypes.CDLL) -> None:
    """A small batch is split until it fills the machine, a large one not at all."""
    assert plan(library, B=1024).splits == 1
    for batch in (1, 2, 8, 32, 100):
        found = plan(library, B=batch, S=8192)
        assert found.splits > 1 and batch * found.splits >= 0.4 * 264
        assert 8192 / found.splits >= 2 * found.warps * found.rows
    assert plan(library, B=1, S=20).splits == 1
    assert 100 <= plan(library, B=1, S=10**6).splits <= 128
    assert plan(library, E=2048, T=8)[:2] == (64, 1) and plan(library, E=2048, T=8).query_tiles == 8
    assert plan(library, E=200, K=200, T=5)[:2] == (8, 4)
    for width in (1, 256, 257, 512, 1024, 1025, 2048):
        for queries in (1, 2, 8):
            for score in (0, 1):
                found = plan(library, E=width, K=2048, T=queries, score=score)
                assert found.elements * 32 >= width
                assert found.shared_floats * 4 <= 48 << 10, "a GPU gives no more unasked"


@needs_compiler
def test_counters_are_shared_by_calls_of_one_stream_only(library: ctypes.CDLL) -> None:
    counters = library.new_counters(2, 100)

    def take(stream: int, capturing: bool = False, count: int = 8) -> int:
        return library.take_counters(counters, stream, capturing, count)

    try:
        assert take(7) == take(7) == 0
        assert take(9) == 1024
        assert take(11) == -1  # a third stream clears its own
        captured = [take(7, True, 40), take(9, True, 40)]
        assert captured == [2048, 2088]
        assert take(7, True, 40) == -1 and take(7, True, 20) == 2128
        assert take(9) == 1024
    finally:
        library.delete_counters(counters)
