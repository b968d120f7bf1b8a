"""The rival `com.microsoft.AttnLSTM` of onnxruntime: cell, additive attention, attention layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.targets.decoder.problem import Problem

_INPUTS = (
    *("x", "weight_ih", "weight_hh", "bias", "", "hidden", "cell", ""),
    *("query_weight", "memory_weight", "v", "memory", "", "combine"),
)


def _gates(parameter: Tensor) -> Tensor:
    """Input, forget, cell, output, as torch has them, to input, output, forget, cell."""
    gate_i, gate_f, gate_g, gate_o = parameter.chunk(4)
    return torch.cat((gate_i, gate_o, gate_f, gate_g))


def _tensors(problem: Problem) -> dict[str, Tensor]:
    layer, attention = problem.model.decoder.stack.layers[0], problem.model.decoder.attention
    assert attention is not None
    context, hidden = attention.output_proj.weight.split(
        [problem.sizes.memory, problem.sizes.hidden], dim=1
    )
    return {
        "weight_ih": _gates(layer.weight_ih_l0),
        "weight_hh": _gates(layer.weight_hh_l0),
        "bias": torch.cat((_gates(layer.bias_ih_l0), _gates(layer.bias_hh_l0))),
        "query_weight": attention.query_proj.weight.T,
        "memory_weight": attention.memory_proj.weight.T,
        "v": attention.v,
        "combine": torch.cat((hidden, context), dim=1).T,
    }


def attn_lstm(problem: Problem, threads: int) -> Callable[[], Tensor]:
    """All steps in one call. Returns the last hidden state, (B, H).

    It has no tanh after the attention layer, and projects the memory in each call. Raises
    ImportError without onnx or onnxruntime.
    """
    import onnxruntime

    constants = {
        name: tensor.detach()[None].contiguous().numpy()
        for name, tensor in _tensors(problem).items()
    }
    fed = {
        "x": problem.embedded.transpose(0, 1).contiguous().numpy(),
        "hidden": problem.hidden.numpy(),
        "cell": problem.cell.numpy(),
        "memory": problem.memory.numpy(),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _model(fed, constants, problem.sizes.hidden).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return lambda: torch.from_numpy(session.run(None, fed)[0])[0]


def _model(fed: dict[str, Any], constants: dict[str, Any], hidden: int) -> Any:
    """The ONNX model of one node, with ``constants`` as its initializers."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "AttnLSTM", _INPUTS, ["", "last"], domain="com.microsoft", hidden_size=hidden
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in fed.items()
    ]
    outputs = [helper.make_tensor_value_info("last", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "decoder", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
