"""Launches past Triton's front end: which kernel, which arguments, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import benchmarks_package
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

from fused_attn.backends.triton import launcher

Call = tuple[tuple[torch.Tensor | None, ...], tuple[int | float, ...]]


def a_kernel(x, y, count, scale, BLOCK: tl.constexpr):
    """Never compiled here."""


class Oldest:
    """The launcher of Triton 3.6, which keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
        self.given.append((gridX, gridY, gridZ, stream, function, *args))


class Newest(Oldest):
    """That of Triton 3.9."""

    def __call__(  # type: ignore[override]
        self,
        gridX,
        gridY,
        gridZ,
        stream,
        function,
        kernel_metadata,
        launch_metadata,
        launch_enter_hook,
        launch_exit_hook,
        *args: Any,
    ) -> None:
        hooks = (launch_metadata, launch_enter_hook, launch_exit_hook)
        super().__call__(gridX, gridY, gridZ, stream, function, kernel_metadata, *hooks, *args)


class Other(Oldest):
    """One that nobody knows yet: the stream has moved."""

    def __call__(self, stream, gridX, gridY, gridZ, function, *args) -> None:
        raise AssertionError("a launcher with other parameters was called")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device that does nothing; ``normal`` has the launches by Triton's front end."""
    found = SimpleNamespace(device=0, run=Newest(), normal=[], made=[])

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.normal.append((grid, args, options))
        number = len(found.made)
        compiled = SimpleNamespace(
            run=found.run, function=f"function {number}", packed_metadata=f"metadata {number}"
        )
        found.made.append(compiled)
        return compiled

    active = SimpleNamespace(
        get_current_device=lambda: found.device, get_current_stream=lambda device: 7 + device
    )
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(JITFunction, "run", run)
    return found


def new_kernel() -> Any:
    return JITFunction(a_kernel, do_not_specialize=["count", "scale"])


@pytest.fixture
def bound() -> launcher.Bound:
    return launcher.Bound(new_kernel(), {"BLOCK": 16, "num_warps": 4})


@pytest.mark.parametrize("kind", [Oldest, Newest])
def test_the_second_launch_goes_past_the_front_end(
    kind: type[Oldest], gpu: SimpleNamespace, bound: launcher.Bound
) -> None:
    gpu.run = kind()
    x, y = torch.zeros(4), torch.zeros(8)
    bound((3,), (x, None), (5, 0.5))
    assert gpu.normal == [((3,), (x, None, 5, 0.5), {"BLOCK": 16, "num_warps": 4})]
    assert gpu.run.given == []
    bound((6, 2), (y, None), (2**31 - 1, 1.5))
    assert len(gpu.normal) == 1
    ((*place, first, second, count, scale, block),) = gpu.run.given
    assert place == [6, 2, 1, 7, "function 0", "metadata 0", None, None, None]
    assert first is y and second is None and (count, scale) == (2**31 - 1, 1.5)
    assert block is None  # a constant is part of the kernel


def variants() -> list[Call]:
    """Arguments that differ in what a kernel may depend on, and in what it may not."""
    x, half = torch.zeros(16), torch.zeros(16, dtype=torch.float16)
    return [
        ((x, x), (5, 0.5)),
        ((x, torch.ones(3)), (1, 1.0)),
        ((x, x), (16, -2.0)),
        ((x[4:], x), (0, float("inf"))),
        ((x[1:], x), (5, 0.5)),
        ((x, x[1:]), (5, 0.5)),
        ((x[1:], x[3:]), (5, 0.5)),
        ((half, x), (5, 0.5)),
        ((half[2:], x), (5, 0.5)),
        ((x, half), (5, 0.5)),
        ((None, x), (5, 0.5)),
        ((x, None), (5, 0.5)),
        ((x, None), (2**31, 0.5)),
        ((x, x), (2**31, 0.5)),
        ((x, x), (2**40, float("nan"))),
        ((x, x), (5, float("nan"))),
        ((x, x), (5, 1e30)),
        ((x.int(), x), (5, 0.5)),
        ((x.to(torch.uint8), x), (5, 0.5)),
    ]


def test_a_kernel_is_used_for_what_triton_would_use_it_for(
    gpu: SimpleNamespace, bound: launcher.Bound
) -> None:
    """Triton's own specialisation of the arguments says which calls share a kernel."""
    kernel, backend = bound.kernel, triton.backends.compiler.BaseBackend
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    used: dict[str, set[str]] = {}
    for tensors, numbers in [*variants(), *variants()]:
        special = str(binder(*tensors, *numbers, BLOCK=16)[1])
        before, passed = len(gpu.normal), len(gpu.run.given)
        bound((1,), tensors, numbers)
        is_normal = len(gpu.normal) > before
        assert is_normal != (len(gpu.run.given) > passed)
        name = f"function {before}" if is_normal else gpu.run.given[-1][4]
        used.setdefault(name, set()).add(special)
    assert all(len(kinds) == 1 for kinds in used.values())
    normal = len(gpu.normal)
    for tensors, numbers in variants():
        bound((1,), tensors, numbers)
    assert len(gpu.normal) == normal


def test_lengths_make_no_other_kernel(gpu: SimpleNamespace, bound: launcher.Bound) -> None:
    x = torch.zeros(16)
    for count in range(40):
        bound((1,), (x, x), (count, 1.0))
    assert len(gpu.normal) == 1


def test_every_device_has_its_own(gpu: SimpleNamespace, bound: launcher.Bound) -> None:
    x = torch.zeros(16)
    for device in (0, 1, 0, 1):
        gpu.device = device
        bound((1,), (x, x), (1, 1.0))
    assert len(gpu.normal) == 2
    assert [given[3:5] for given in gpu.run.given] == [(7, "function 0"), (8, "function 1")]


def test_other_constants_are_another_kernel(gpu: SimpleNamespace) -> None:
    x, kernel = torch.zeros(16), new_kernel()
    for block in (16, 32, 16, 32):
        launcher.bound(kernel, {"BLOCK": block})((1,), (x, x), (1, 1.0))
    assert [options for _, _, options in gpu.normal] == [{"BLOCK": 16}, {"BLOCK": 32}]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_hooks_see_every_launch(hook: str, gpu: SimpleNamespace, bound: launcher.Bound) -> None:
    x = torch.zeros(16)
    bound((1,), (x, x), (1, 1.0))

    def watch(*_: Any, **__: Any) -> None:
        """Triton's front end would call it."""

    if hook == "pre_run_hooks":
        bound.kernel.add_pre_run_hook(watch)
        remove = bound.kernel.pre_run_hooks.clear
    else:
        chain = getattr(triton.knobs.runtime, hook)
        chain.add(watch)

        def remove() -> None:
            chain.remove(watch)

    try:
        bound((1,), (x, x), (1, 1.0))
        assert len(gpu.normal) == 2 and not gpu.run.given
    finally:
        remove()
    bound((1,), (x, x), (1, 1.0))
    assert len(gpu.normal) == 2 and len(gpu.run.given) == 1


@pytest.mark.parametrize("unknown", ["parameters", "attribute", "nothing", "future"])
def test_an_unknown_version_is_launched_as_documented(
    unknown: str, gpu: SimpleNamespace, bound: launcher.Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unknown == "parameters":
        gpu.run = Other()
    else:
        front_end = JITFunction.run
        kept = {
            "attribute": SimpleNamespace(run=gpu.run, function=1),
            "nothing": None,  # what `jit_cache_hook` makes of it
            "future": object(),
        }[unknown]

        def run(self: Any, *args: Any, **options: Any) -> Any:
            front_end(self, *args, **options)
            return kept

        monkeypatch.setattr(JITFunction, "run", run)
    x = torch.zeros(16)
    for _ in range(3):
        bound((2,), (x, x), (1, 1.0))
    assert [grid for grid, _, _ in gpu.normal] == [(2,)] * 3
    assert gpu.run.given == []


def run_benchmark(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "launches", *arguments],
        cwd=benchmarks_package.ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


def test_random_batches_share_few_kernels_and_calls_have_few_launches() -> None:
    done = run_benchmark("--seconds", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    costs, counts = done.stdout.split("\n\n")
    rows = [line.split() for line in costs.splitlines()[2:]]
    assert len(rows) == 12
    for score, pass_, _, _, launches, us_a_call, _ in rows:
        most = {"dot forward": 2, "dot backward": 3, "concat forward": 3, "concat backward": 4}
        assert 1 <= int(launches) <= most[f"{score} {pass_}"]
        assert 0.0 < float(us_a_call) < 5000.0  # what it costs on a quiet machine is a benchmark
    kernels = dict(line.split(": ") for line in counts.splitlines()[1:])
    assert kernels.keys() == {
        f"{s} {d}" for s in ("dot", "concat") for d in ("bfloat16", "float32")
    }
    assert all(4 <= int(number) <= 12 for number in kernels.values())


def test_the_benchmark_needs_kernels_that_are_launched() -> None:
    done = run_benchmark(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr
