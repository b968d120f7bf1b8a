"""`LuongDecoder`: embedding, recurrent layers, attention and output layer, as one module.

Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fused_attn import checks, decoder_spec, decoder_steps, greedy, modules, native_decoder
from fused_attn import decoder_parts as parts
from fused_attn import layer_options as options
from fused_attn.attention import LuongAttention
from fused_attn.choices import COMPUTE
from fused_attn.decoder_parts import DecoderOutput, DecoderState, GreedyOutput
from fused_attn.native_decoder import NativeDecoder
from fused_attn.prepared import PreparedMemory
from fused_attn.recurrent import CELLS, RecurrentStack
from fused_attn.reference import arithmetic_dtype


class LuongDecoder(nn.Module):
    """A recurrent decoder with attention (Luong et al. 2015).

    At step t, for the symbol y_{t-1} before and the memory m:

        x_t = [embedding(y_{t-1}); h~_{t-1}]   with input feeding (section 3.3)
        h_t = RNN(x_t, h_{t-1})                the output of the last of the layers
        c_t = attention(h_t, m)
        h~_t = tanh(W_c [c_t; h_t])            eq. 5
        p(y_t | y_<t) = softmax(W_s h~_t)      eq. 6

    Without input feeding, x_t is the embedding alone.

    Shapes: N rows (sentences), T steps, S source positions, V symbols, E width of the memory, H
    width of the attentional state h~: ``output_dim`` of the attention, or E if that is None (h~ is
    then the context c), or ``hidden`` without attention (h~ is then h).

    Args:
        input_size: width of an embedded symbol.
        hidden: width of each recurrent layer.
        cell: "lstm", "gru" or "rnn" (tanh).
        layers: number of recurrent layers.
        bias: whether the recurrent layers have biases.
        residual: adds the input of a recurrent layer to its output where their widths agree.
        embedding: an `nn.Embedding` of width input_size, or an int, the number of symbols of a new
            one. With None the inputs must be embedded already.
        attention: a `LuongAttention` with query_dim = hidden, or the options of a new one, such as
            ``{"score": "general", "memory_dim": 1024, "output_dim": 512}``, or None for a decoder
            without attention.
        input_feeding: appends h~ of the previous step to the input of the first layer.
        vocab_size: the number V of symbols of the output layer. With None there is no output layer.
        output_bias: whether the output layer has a bias.
        output_proj_dim: width of a projection without a bias between h~ and the output layer, or
            None for no projection.
        tie_embedding: makes the weight of the output layer that of the embedding (Press & Wolf
            2017). The width before the output layer must then be input_size.
        dropout: probability of dropping an element between two recurrent layers, and of h~ before
            it is fed and projected, in training mode.
        input_dropout: the same for the embedded inputs.
        backend: "auto" runs all steps of a call natively where that is possible and pays; "eager"
            always runs them in torch, and so does a subclass. The attention has a backend of its
            own.
        compute: type of the native products, "float32", "bfloat16" or "int8". The last two are
            less exact and several times faster for few rows.
        device, dtype: device and dtype of new parameters.

    Native calls: with float32 parameters on the CPU, `greedy` runs natively if nothing needs a
    gradient, so call it under ``torch.no_grad()``. `forward` does too if a step depends on the one
    before (`is_stepwise`) and there are at least S / 4 steps. ``compute`` has an effect on these
    calls only. Results are float32 whatever it is. See `not_native_reasons`.

    Parameters: ``embedding.weight`` (V, input_size); ``recurrent.layers.0.weight_ih`` and so on, as
    in torch's cells; those of the `LuongAttention` under ``attention.``;
    ``output_proj.weight`` (output_proj_dim, H); ``output_layer.weight`` and ``output_layer.bias``.

    Raises TypeError or ValueError if an option is invalid or does not fit the others.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        *,
        cell: str = "lstm",
        layers: int = 1,
        bias: bool = True,
        residual: bool = False,
        embedding: nn.Embedding | int | None = None,
        attention: LuongAttention | Mapping[str, Any] | None = None,
        input_feeding: bool = False,
        vocab_size: int | None = None,
        output_bias: bool = True,
        output_proj_dim: int | None = None,
        tie_embedding: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        backend: str = "auto",
        compute: str = "float32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options.check_choice("cell", cell, tuple(CELLS))
        self.backend = options.check_choice("backend", backend, ("auto", "eager"))
        self.compute = options.check_choice("compute", compute, COMPUTE)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_size = input_size = options.check_size("input_size", input_size)
        self.hidden = hidden = options.check_size("hidden", hidden)
        self.dropout = checks.probability("dropout", dropout)
        self.input_dropout = checks.probability("input_dropout", input_dropout)
        self.input_feeding = input_feeding
        self.embedding = parts.embedding_of(embedding, input_size, where)
        self.attention = parts.attention_of(attention, hidden, where)
        self.output_dim = parts.output_dim_of(self.attention, hidden)
        self.recurrent = RecurrentStack(
            cell,
            input_size + (self.output_dim if input_feeding else 0),
            hidden,
            options.check_size("layers", layers),
            bias=bias,
            residual=residual,
            dropout=self.dropout,
            **where,
        )
        self.output_proj: nn.Linear | None = None
        self.output_layer: nn.Linear | None = None
        symbols = parts.vocabulary_of(vocab_size, self.embedding, tie_embedding)
        between = options.check_optional_size("output_proj_dim", output_proj_dim)
        if symbols is None:
            parts.check_no_output(between)
            return
        if between is not None:
            self.output_proj = nn.Linear(self.output_dim, between, bias=False, **where)
        width = between or self.output_dim
        self.output_layer = nn.Linear(width, symbols, bias=output_bias, **where)
        if tie_embedding and self.embedding is not None:
            parts.check_tied(width, input_size)
            self.output_layer.weight = self.embedding.weight

    @property
    def is_stepwise(self) -> bool:
        """Whether a step depends on the attention of the step before it.

        If not, `forward` runs all steps at once.
        """
        history = None if self.attention is None else self.attention.history
        return self.input_feeding or history is not None

    def forward(
        self,
        inputs: Tensor,
        memory: Any = None,
        memory_lengths: Tensor | None = None,
        state: DecoderState | None = None,
        *,
        return_weights: bool = False,
    ) -> tuple[DecoderOutput, DecoderState]:
        """Run T steps over given inputs.

        inputs: int64 symbols (N, T), the symbols that precede those to predict, or embedded symbols
            (N, T, input_size).
        memory: encoder states (N, S, E), or anything else that `LuongAttention` takes. A memory
            with a mask is given as ``attention.prepare_memory(memory, memory_mask=mask)``. None
            without attention.
        memory_lengths: integers (N,) in 0..S, or None. A row with length 0 has the context 0.
        state: the state after the steps before; None means zeros.
        return_weights: whether to return the alignment weights.

        Returns a `DecoderOutput`: the attentional states (N, T, H), the logits (N, T, V) or None,
        and the weights (N, T, S) or None; and the `DecoderState` after the last step.

        Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
        """
        like = self._like()
        parts.check_inputs(inputs, self.embedding is not None, self.input_size, like)
        parts.check_memory(memory, self.attention is not None, memory_lengths, like)
        embedded = self._embed(inputs)
        rows, steps = embedded.shape[:2]
        if self.attention is not None and parts.rows_of_memory(memory) != rows:
            raise ValueError(
                f"memory must have a row for each of the {rows} rows of inputs, "
                f"got {parts.rows_of_memory(memory)}"
            )
        state = self._start(state, rows, parts.source_of(memory), embedded)
        if self.is_stepwise and 4 * steps >= parts.source_of(memory):
            native = self._native(memory, memory_lengths, inputs, state)
            if native is not None and (native.takes_embedded or not inputs.is_floating_point()):
                return native.forward(inputs, memory, memory_lengths, state, return_weights)
        memory, memory_lengths = self._prepare(memory, memory_lengths, self.is_stepwise)
        source = decoder_steps.Source(memory, memory_lengths, return_weights)
        attentional, weights, state = decoder_steps.run(self, embedded, state, source)
        return DecoderOutput(attentional, self._logits(attentional), weights), state

    def greedy(
        self,
        memory: Any = None,
        memory_lengths: Tensor | None = None,
        state: DecoderState | None = None,
        *,
        bos: int,
        eos: int,
        max_length: int,
        return_weights: bool = False,
    ) -> GreedyOutput:
        """Decode greedily: feed each row its most probable symbol until that is ``eos``.

        memory, memory_lengths, state: as `forward` takes them. Without attention ``state`` must be
            given, as it says how many rows there are.
        bos, eos: the symbol to begin with, and the symbol that ends a row.
        max_length: the largest number of symbols, ``eos`` included.
        return_weights: whether to return the alignment weights.

        Returns a `GreedyOutput`. Rows that have ended are left out as soon as they are half of the
        rows. If gradients are enabled and a parameter requires one, all steps run in torch, several
        times slower, and ``log_probs`` has a gradient.

        Raises the errors of `forward`, and ValueError if the decoder has no embedding or no output
        layer, or if these do not have the symbols.
        """
        limits = greedy.limits_of(self.embedding, self.output_layer, bos, eos, max_length)
        parts.check_memory(memory, self.attention is not None, memory_lengths, self._like())
        if self.attention is None and state is None:
            raise ValueError("state must be given to a decoder without attention, got None")
        rows = parts.rows_of_state(state) if memory is None else parts.rows_of_memory(memory)
        state = self._start(state, rows, parts.source_of(memory), self._like())
        # The hooks of the decoder run when a step calls it.
        native = self._native(memory, memory_lengths, None, state)
        if native is not None and not modules.hooks_of(self):
            return native.greedy(memory, memory_lengths, state, limits, return_weights)
        memory, _ = self._prepare(memory, memory_lengths, True)
        return greedy.search(self, memory, state, limits, return_weights)

    def not_native_reasons(self) -> list[str]:
        """Return why calls run step by step in torch, in short phrases.

        Empty if calls that need no gradient run natively, all their steps in one call. `forward`
        also needs steps that depend on one another, at least S / 4 of them.
        """
        if type(self) is not LuongDecoder:
            return [f"the decoder is a {type(self).__name__}"]
        return native_decoder.not_native_reasons(self)

    def _native(
        self, memory: Any, lengths: Any, inputs: Tensor | None, state: DecoderState
    ) -> NativeDecoder | None:
        """The packed decoder, None if a call with these tensors must run in torch."""
        if type(self) is not LuongDecoder or native_decoder.is_left_to_torch(self):
            return None
        if isinstance(memory, PreparedMemory) and self.attention is not None:
            options.check_prepared(self.attention, memory, lengths, None)
            if memory.memory_mask is not None:
                return None
            memory = memory.memory
        if memory is not None and type(memory) is not Tensor:
            return None
        known = self.__dict__.get("_packed")
        self.__dict__["_packed"] = native = native_decoder.native_of(self, known)
        if native is None:
            return None
        given = (memory, inputs, *state.hidden, state.attentional, state.coverage)
        return native if native.takes(self, *given) else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def _spec(self) -> dict[str, Any]:
        """The decoder as its tensors, without copies.

        Raises ValueError with all reasons if these cannot describe it.
        """
        return decoder_spec.spec(self)

    def _like(self) -> Tensor:
        """A parameter that has the dtype and device of the decoder."""
        weight = getattr(self.recurrent.layers[0], "weight_ih", None)
        # A layer that was replaced, such as by a quantised one, may have no such tensor.
        return weight if isinstance(weight, Tensor) else next(self.parameters())

    def _embed(self, inputs: Tensor) -> Tensor:
        embedded = inputs
        if not inputs.is_floating_point():
            assert self.embedding is not None
            if torch.compiler.is_compiling() or not inputs.is_cpu:
                embedded = self.embedding(inputs)
            else:
                try:
                    embedded = self.embedding(inputs)
                except IndexError as error:
                    symbols = self.embedding.num_embeddings
                    raise ValueError(
                        f"inputs must be symbols in 0..{symbols - 1}, "
                        f"got {int(inputs.min())}..{int(inputs.max())}"
                    ) from error
        if self.training and self.input_dropout:
            embedded = dropout(embedded, self.input_dropout)
        return embedded

    def _prepare(
        self, memory: Any, lengths: Tensor | None, is_wanted: bool
    ) -> tuple[Any, Tensor | None]:
        """The memory and its lengths, prepared if there are several steps one after the other."""
        if self.attention is None or not is_wanted:
            return memory, lengths
        if isinstance(memory, PreparedMemory):
            options.check_prepared(self.attention, memory, lengths, None)
            return memory, None
        return self.attention.prepare_memory(memory, lengths), None

    def _start(
        self, state: DecoderState | None, rows: int, source: int, like: Tensor
    ) -> DecoderState:
        """The checked state, with zeros for what it lacks, in the dtype and device of ``like``."""
        stack = self.recurrent
        shape = (len(stack.layers), rows, stack.hidden)
        history = None if self.attention is None else self.attention.history
        widths = {"attentional": self.output_dim} if self.input_feeding else {}
        if history is not None:
            widths |= {"coverage": source} if history.coverage else {}
            widths |= {"previous_weights": source} if history.channels else {}
        if state is not None:
            parts.rows_of_state(state)
        else:
            state = DecoderState(tuple(like.new_zeros(shape) for _ in range(stack.tensors)))
        parts.check_state(state, (stack.tensors, *shape), widths, like)
        zeros: dict[str, Any] = {}
        for name, width in widths.items():
            if getattr(state, name) is None:
                dtype = like.dtype if name == "attentional" else arithmetic_dtype(like.dtype)
                zeros[name] = like.new_zeros((rows, width), dtype=dtype)
        return state._replace(**zeros)

    def _logits(self, attentional: Tensor) -> Tensor | None:
        if self.output_layer is None:
            return None
        if self.output_proj is not None:
            attentional = self.output_proj(attentional)
        logits: Tensor = self.output_layer(attentional)
        return logits

    def extra_repr(self) -> str:
        return "input_feeding=True" if self.input_feeding else ""
