"""The results and the state of `LuongDecoder`, its options, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_attn import checks
from fused_attn import layer_options as options
from fused_attn.attention import LuongAttention
from fused_attn.prepared import PreparedMemory
from fused_attn.recurrent import Hidden


class DecoderState(NamedTuple):
    """The state of a `LuongDecoder` between two steps, for N rows.

    ``DecoderState(hidden)`` is a state before the first step: what is None counts as zeros.
    """

    hidden: Hidden  # (h,), or (h, c) for an LSTM, each (layers, N, hidden)
    attentional: Tensor | None = None  # (N, H), h~ of the last step, with input feeding
    coverage: Tensor | None = None  # (N, S), sum of the weights so far, with coverage
    previous_weights: Tensor | None = None  # (N, S), of the last step, with conv_channels
    position: int | Tensor = 0  # number of steps done, an int or an int64 Tensor ()

    def index_select(self, rows: Tensor) -> DecoderState:
        """Return the state of ``rows``, int64 (M,). A row may repeat."""
        fed, covered, last = (
            None if tensor is None else tensor.index_select(0, rows) for tensor in self[1:4]
        )
        hidden = tuple(tensor.index_select(1, rows) for tensor in self.hidden)
        return DecoderState(hidden, fed, covered, last, self.position)


class DecoderOutput(NamedTuple):
    """What `LuongDecoder.forward` computes in T steps."""

    attentional: Tensor  # (N, T, H), h~ of eq. 5
    logits: Tensor | None  # (N, T, vocab_size); None without an output layer
    weights: Tensor | None  # (N, T, S), the alignment weights; None if not asked for


class GreedyOutput(NamedTuple):
    """The most probable symbol of each step. L is the largest of ``lengths``."""

    symbols: Tensor  # int64 (N, L), without BOS, with EOS where a row has ended; padded with EOS
    log_probs: Tensor  # (N, L), log probability of each symbol; padded with 0
    lengths: Tensor  # int64 (N,), number of symbols of each row, EOS included
    weights: Tensor | None  # (N, L, S), padded with 0; None if not asked for


def rows_of_memory(memory: Any) -> int:
    """The number of rows B of a memory of any kind that `LuongAttention` takes."""
    if isinstance(memory, PreparedMemory):
        return len(memory)
    if isinstance(memory, PackedSequence):
        return int(memory.batch_sizes[0])
    if not isinstance(memory, Tensor) or memory.dim() != 3:
        got = tuple(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise (ValueError if isinstance(memory, Tensor) else TypeError)(
            f"memory must be a Tensor (N, S, E) or a PreparedMemory, got {got}"
        )
    return memory.shape[0]


def source_of(memory: Any) -> int:
    """The number of positions S of a memory that `rows_of_memory` takes; 0 for None."""
    if memory is None:
        return 0
    if isinstance(memory, PackedSequence):
        return len(memory.batch_sizes)
    states: Any = memory.memory if isinstance(memory, PreparedMemory) else memory
    return int(states.offsets().diff().max()) if states.is_nested else int(states.shape[1])


def check_memory(memory: Any, attends: bool, memory_lengths: object, like: Tensor) -> None:
    """Raise unless a memory is given to a decoder with attention, and none to one without.

    It must have the dtype and device of ``like``; the dtype may differ under autocast.
    """
    if not attends:
        if memory is not None or memory_lengths is not None:
            name = "memory" if memory is not None else "memory_lengths"
            raise ValueError(f"{name} must be None for a decoder without attention")
        return
    if memory is None:
        raise ValueError("memory must be given to a decoder with attention, got None")
    rows_of_memory(memory)
    states: Any = memory.memory if isinstance(memory, PreparedMemory) else memory
    states = states.data if isinstance(states, PackedSequence) else states
    if states.device != like.device:
        raise ValueError(
            f"memory must be on the device of the decoder, {like.device}, got {states.device}"
        )
    _check_dtype("memory", states, like)


def _check_dtype(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype == like.dtype or torch.is_autocast_enabled(like.device.type):
        return
    wanted, got = (str(dtype).removeprefix("torch.") for dtype in (like.dtype, tensor.dtype))
    raise TypeError(f"{name} must have the dtype of the decoder, {wanted}, got {got}")


def rows_of_state(state: Any) -> int:
    """The number of rows N of a state whose hidden tensors were not checked yet."""
    if not isinstance(state, DecoderState):
        raise TypeError(f"state must be a DecoderState or None, got {type(state).__name__}")
    first = state.hidden[0] if isinstance(state.hidden, tuple) and state.hidden else None
    if not isinstance(first, Tensor) or first.dim() != 3:
        told: Any = type(state.hidden if first is None else first).__name__
        told = tuple(first.shape) if isinstance(first, Tensor) else told
        raise ValueError(f"state.hidden must be a tuple of tensors (layers, N, hidden), got {told}")
    return first.shape[1]


def check_inputs(inputs: Any, has_embedding: bool, width: int, like: Tensor) -> None:
    """Raise unless inputs are integers (N, T), or (N, T, width) of the dtype of ``like``."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a Tensor, got {type(inputs).__name__}")
    if inputs.is_floating_point():
        if inputs.dim() != 3 or inputs.shape[2] != width:
            raise ValueError(
                f"embedded inputs must have shape (N, T, {width}), got {tuple(inputs.shape)}"
            )
        _check_dtype("inputs", inputs, like)
        return
    if inputs.dtype not in (torch.int64, torch.int32):
        kind = str(inputs.dtype).removeprefix("torch.")
        raise TypeError(f"inputs must be int64 symbols or embedded symbols, got {kind}")
    if not has_embedding:
        raise ValueError(
            f"inputs must be embedded symbols (N, T, {width}), because the decoder has no "
            "embedding, got integers"
        )
    if inputs.dim() != 2:
        raise ValueError(f"inputs must have shape (N, T), got {tuple(inputs.shape)}")


def check_state(
    state: DecoderState, hidden: tuple[int, int, int, int], widths: dict[str, int], like: Tensor
) -> None:
    """Raise unless a state fits.

    ``hidden`` is the number of hidden tensors, and the shape of each. ``widths`` has the last
    dimension of each other tensor that the decoder uses. The hidden tensors must have the dtype of
    ``like``; the dtype may differ under autocast.
    """
    count, *shape = hidden
    got = state.hidden
    if not isinstance(got, tuple) or len(got) != count:
        names = "(h, c)" if count == 2 else "(h,)"
        told = f"{len(got)} of them" if isinstance(got, tuple) else type(got).__name__
        raise ValueError(f"state.hidden must be a tuple of tensors {names}, got {told}")
    for number, tensor in enumerate(got):
        _check_shape(f"state.hidden[{number}]", tensor, tuple(shape))
        _check_dtype(f"state.hidden[{number}]", tensor, like)
    if not isinstance(state.position, Tensor) and checks.integer(state.position) is None:
        kind = type(state.position).__name__
        raise TypeError(f"state.position must be an int or an int64 Tensor (), got {kind}")
    for name in ("attentional", "coverage", "previous_weights"):
        tensor = getattr(state, name)
        if tensor is not None and name not in widths:
            raise ValueError(f"state.{name} must be None: this decoder does not use it")
        if tensor is not None:
            _check_shape(f"state.{name}", tensor, (shape[1], widths[name]))


def _check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def embedding_of(embedding: Any, input_size: int, where: dict[str, Any]) -> nn.Embedding | None:
    """The embedding of a decoder, from its option."""
    if embedding is None or isinstance(embedding, nn.Embedding):
        if embedding is not None and embedding.embedding_dim != input_size:
            raise ValueError(
                f"embedding must have the width input_size = {input_size}, "
                f"got {embedding.embedding_dim}"
            )
        return embedding
    if checks.integer(embedding) is None:
        raise TypeError(
            "embedding must be an nn.Embedding, a number of symbols or None, "
            f"got {type(embedding).__name__}"
        )
    return nn.Embedding(options.check_size("embedding", embedding), input_size, **where)


def attention_of(attention: Any, hidden: int, where: dict[str, Any]) -> LuongAttention | None:
    """The attention of a decoder, from its option."""
    if isinstance(attention, Mapping):
        attention = LuongAttention(**{"query_dim": hidden, **where, **attention})
    if attention is not None and not isinstance(attention, LuongAttention):
        raise TypeError(
            "attention must be a LuongAttention, its options or None, "
            f"got {type(attention).__name__}"
        )
    if attention is not None and attention.query_dim != hidden:
        raise ValueError(
            f"attention must have query_dim = hidden = {hidden}, got {attention.query_dim}"
        )
    return attention


def output_dim_of(attention: LuongAttention | None, hidden: int) -> int:
    """The width H of the attentional state."""
    if attention is None:
        return hidden
    return attention.memory_dim if attention.output_dim is None else attention.output_dim


def vocabulary_of(
    vocab_size: int | None, embedding: nn.Embedding | None, tie_embedding: bool
) -> int | None:
    """The number of symbols of the output layer, or None if there is none."""
    symbols = options.check_optional_size("vocab_size", vocab_size)
    if not tie_embedding:
        return symbols
    if embedding is None:
        raise ValueError("tie_embedding=True requires an embedding, got embedding=None")
    if symbols not in (None, embedding.num_embeddings):
        raise ValueError(
            "tie_embedding=True requires vocab_size to be None or the number of symbols of the "
            f"embedding, {embedding.num_embeddings}, got {symbols}"
        )
    return embedding.num_embeddings


def check_no_output(output_proj_dim: object) -> None:
    """Raise if there is a projection before an output layer that does not exist."""
    if output_proj_dim is not None:
        raise ValueError(
            "output_proj_dim must be None without an output layer (vocab_size=None), "
            f"got {output_proj_dim!r}"
        )


def check_tied(width: int, input_size: int) -> None:
    """Raise unless an output layer of this input width can have the embedding's weight."""
    if width != input_size:
        raise ValueError(
            "tie_embedding=True requires that the output layer has the width of the embedding, "
            f"{input_size}, got {width}: set output_proj_dim={input_size}"
        )
