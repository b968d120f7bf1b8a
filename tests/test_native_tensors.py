"""Tensor exchange with C++ (csrc/tensor_exchange.h): unusual, invalid and new tensors."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import backends, functional

native: Any = pytest.importorskip("fused_attn._C", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    bool(backends.unavailable_reasons("cpu")), reason="the cpu backend is not usable here"
)
NOTHING = (None, None, None, 1.0, None)


def attend(query: Tensor, memory: Tensor, **options: Any) -> Tensor:
    return functional.dot_attention(query, memory, backend="cpu", **options)[0]


def problem(batch: int = 2, queries: int = 3, source: int = 5, width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, queries, width, generator=generator)
    return query, torch.randn(batch, source, width, generator=generator)


def test_tensors_that_require_grad_pass_without_a_copy() -> None:
    query, memory = problem()
    expected = attend(query, memory)
    with torch.no_grad():
        got = attend(query.requires_grad_(), torch.nn.Parameter(memory))
    assert torch.equal(got, expected) and not got.requires_grad


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_a_tensor_with_the_negative_bit_is_read_as_its_values(grad: bool) -> None:
    """The dispatcher resolves the bit before native code, which would ignore it."""
    query, memory = problem()
    hidden = torch.view_as_complex(torch.stack((memory, -memory), dim=-1)).conj().imag
    assert hidden.is_neg() and hidden.stride(-1) == 2 and torch.equal(hidden, memory)
    leaves = (query.requires_grad_(grad), memory.requires_grad_(grad))
    found = [attend(query, memory), attend(query, hidden.detach().requires_grad_(grad))]
    if grad:
        found = [torch.autograd.grad(context.sum(), leaves[0])[0] for context in found]
    assert torch.equal(*found)


def test_strides_of_any_kind() -> None:
    query, memory = problem()
    expected = attend(query, memory)
    for change in (
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],  # not of unit stride
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),  # an offset
    ):
        assert torch.equal(attend(change(query), change(memory)), expected)
    one = torch.ones(1, 1, 1).as_strided((1, 1, 1), (7, 5, 3))  # one element: any stride is valid
    assert attend(one, one).item() == 1.0


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_nothing_in_a_dimension(shape: tuple[int, int, int]) -> None:
    batch, queries, source = shape
    query, memory = problem(batch, queries, source)
    lengths = torch.full((batch,), source, dtype=torch.int32)
    context = attend(query.requires_grad_(), memory.requires_grad_(), memory_lengths=lengths)
    assert context.shape == query.shape and not context.any()
    context.sum().backward()
    assert memory.grad is not None and not query.grad.any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_lengths_of_every_integer_type(kind: torch.dtype) -> None:
    query, memory = problem()
    lengths = torch.tensor([[4, 0], [2, 0]], dtype=kind)[:, 0]  # not contiguous
    expected = attend(query, memory, memory_mask=torch.arange(5) < lengths[:, None])
    assert torch.equal(attend(query, memory, memory_lengths=lengths), expected)


@pytest.mark.parametrize("sizes", [(2, 5), (2, 1, 5), (2, 3, 5)], ids=str)
def test_masks_of_every_shape(sizes: tuple[int, ...]) -> None:
    query, memory = problem()
    mask = torch.tensor([True, False, True, True, False]).expand(sizes)  # strides of 0
    assert torch.equal(attend(query, memory, memory_mask=mask), attend(query, memory[:, [0, 2, 3]]))


WRONG = [  # what replaces an argument of dot_forward, and what the error says
    ({0: None}, TypeError, "query must be a Tensor, got NoneType"),
    ({1: [1.0]}, TypeError, "memory must be a Tensor, got list"),
    ({0: torch.ones(2, 8)}, ValueError, r"shapes \(B, T, K\) and \(B, S, E\), got \(2, 8\)"),
    ({0: torch.ones(1, 3, 8)}, ValueError, r"query must have shape \(2, 3, 8\), got \(1, 3, 8\)"),
    ({0: torch.ones(2, 3, 9)}, ValueError, r"query must have shape \(2, 3, 8\), got \(2, 3, 9\)"),
    ({0: torch.ones(2, 3, 8).double()}, TypeError, "query must have the dtype float32, got f.*64"),
    ({1: torch.ones(2, 5, 8).int()}, TypeError, "memory must have the dtype float32, float64"),
    ({2: "x"}, TypeError, "real number"),
    ({3: (None, None)}, TypeError, "masking must be a tuple"),
    ({3: (torch.ones(3).int(), *NOTHING[1:])}, ValueError, r"memory_lengths .*\(2,\), got \(3,\)"),
    ({3: (torch.ones(2), *NOTHING[1:])}, TypeError, "memory_lengths must be an integer Tensor"),
    ({3: (torch.tensor([5, 6]), *NOTHING[1:])}, ValueError, r"must lie in 0\.\.5 .* got 6"),
    ({3: (torch.tensor([-1, 5]), *NOTHING[1:])}, ValueError, r"must lie in 0\.\.5 .* got -1"),
    (
        {3: (None, torch.ones(2, 2, 5).bool(), None, 1.0, None)},
        ValueError,
        r"memory_mask .*\(2, 3, 5\)",
    ),
    (
        {3: (None, torch.ones(2, 5), None, 1.0, None)},
        TypeError,
        "memory_mask must be a bool Tensor",
    ),
    (
        {3: (None, None, torch.ones(2, 1, 5).bool(), 1.0, None)},
        ValueError,
        r"keep_mask .*\(2, 3, 5\)",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments_are_refused_before_any_work(
    changes: dict[int, Any], error: type[Exception], message: str
) -> None:
    arguments = [*problem(), 1.0, NOTHING, True, True]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        native.dot_forward(*arguments)


def test_the_number_of_arguments_is_checked() -> None:
    with pytest.raises(TypeError, match="expected 6 arguments, got 2"):
        native.dot_forward(*problem())


def test_the_operator_refuses_shapes_that_do_not_fit() -> None:
    """Without the checks of the public functions, it must still not read out of bounds."""
    query, memory = problem()
    with pytest.raises(ValueError, match=r"query must have shape \(2, 3, 8\)"):
        torch.ops.fused_attn.dot_attention(query[..., :4], memory, backend="cpu")


def test_results_are_ordinary_tensors() -> None:
    query, memory = problem()
    context, weights, logsumexp = native.dot_forward(query, memory, 1.0, NOTHING, True, True)
    for result in (context, weights, logsumexp):
        assert type(result) is Tensor and result.device.type == "cpu"
        assert result.is_leaf and not result.requires_grad and result.is_contiguous()
        assert result.data_ptr() % 64 == 0
        before = result.clone()
        file = io.BytesIO()
        torch.save(result, file)
        file.seek(0)
        for other in (
            copy.deepcopy(result),
            pickle.loads(pickle.dumps(result)),
            torch.load(file, weights_only=True),
        ):
            assert torch.equal(other, before)
        version = result._version
        result.add_(1)
        assert result._version == version + 1 and torch.equal(result, before + 1)
        result.resize_(1000).fill_(2)  # beyond its storage
        assert result.sum() == 2000
        result.requires_grad_().sum().backward()
        assert result.grad is not None


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["forward", "backward", "refused", "copied"])
def test_ten_thousand_calls_leave_nothing_behind(case: str) -> None:
    """Context and gradients have 4 KiB or more: leaking one per call would take 40 MB."""
    query, memory = problem(batch=2, queries=1, source=4, width=512)
    context, weights, logsumexp = native.dot_forward(query, memory, 1.0, NOTHING, True, True)
    saved, lengths = (context, weights, logsumexp), torch.tensor([4, 3])
    strided, bad = memory.repeat_interleave(2, dim=-1)[..., ::2], torch.tensor([4, 5])

    def call() -> None:
        if case == "forward":
            native.dot_forward(query, memory, 1.0, (lengths, None, None, 1.0, None), True, True)
        elif case == "backward":
            native.dot_backward(None, weights, query, memory, 1.0, NOTHING, saved, [True] * 3)
        elif case == "copied":
            native.dot_forward(query, strided, 1.0, NOTHING, False, False)
        else:
            with pytest.raises(ValueError, match="memory_lengths"):
                native.dot_forward(query, strided, 1.0, (bad, None, None, 1.0, None), False, False)

    for _ in range(500):
        call()
    references, before = [sys.getrefcount(x) for x in (query, memory, *saved)], resident_bytes()
    for _ in range(10_000):
        call()
    assert resident_bytes() - before < 4 << 20
    assert [sys.getrefcount(x) for x in (query, memory, *saved)] == references


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    inputs = [problem(source=40 + 30 * i, width=64) for i in range(4)]
    expected = [attend(*pair) for pair in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            for got, wanted in zip(
                pool.map(lambda pair: attend(*pair), inputs), expected, strict=True
            ):
                assert torch.equal(got, wanted)


FORK = """
import os, torch
from fused_attn import functional
torch.set_num_threads(1)
query, memory = torch.ones(2, 1, 8), torch.ones(2, 5, 8)
expected, _ = functional.dot_attention(query, memory, backend="cpu")
child = os.fork()
if child == 0:
    got, _ = functional.dot_attention(query, memory, backend="cpu")
    os._exit(0 if torch.equal(got, expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_can_call() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def torch_like(**attributes: Any) -> ModuleType:
    module = ModuleType("torch")
    vars(module).update(__version__="9.9", Tensor=SimpleNamespace(**attributes))
    return module


def test_a_torch_without_the_table_is_refused() -> None:
    with pytest.raises(ImportError, match=r"torch 9\.9 has no Tensor\.__dlpack_c_exchange_api__"):
        native.bind_torch(torch_like())


def test_a_table_of_another_version_is_refused() -> None:
    table = (ctypes.c_uint64 * 7)(2)  # major version 2, minor 0, and no older table
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    made = capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)
    with pytest.raises(ImportError, match=r"torch 9\.9 exchanges tensors by DLPack 2, expected 1"):
        native.bind_torch(torch_like(__dlpack_c_exchange_api__=made))
    attend(*problem())  # the first binding still works


@pytest.mark.parametrize(
    ("dtype", "exp_dtype"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.half)],
)
def test_exponentials_of_another_type_are_refused(
    dtype: torch.dtype, exp_dtype: torch.dtype
) -> None:
    query, memory = (tensor.to(dtype) for tensor in problem())
    operands = (query, memory, memory.to(exp_dtype), torch.ones(8, dtype=dtype), memory)
    with pytest.raises(TypeError, match="memory_exp must have the dtype float"):
        native.concat_forward(*operands, NOTHING, False, False)
