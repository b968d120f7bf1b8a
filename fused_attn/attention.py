"""`LuongAttention`: the layer with its parameters, around one call of an attention operator.

Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_attn import checks, composed, functional, modules, ragged, scores, warm_up
from fused_attn import layer_options as options
from fused_attn.layer_parts import (
    AlignmentHistory,
    NormedLinear,
    PredictedPosition,
    fold_history,
    monotonic_centers,
)
from fused_attn.prepared import PreparedMemory, exponentials
from fused_attn.reference import (
    LocalWindow,
    Masking,
    MaskingFields,
    zero_uncounted_rows,
)


class LuongAttention(nn.Module):
    """Attention of decoder states over encoder states (Luong et al. 2015).

    Shapes: B batch, T queries (decoder steps), S source positions.

    Args:
        query_dim: width D of the query, the decoder state h_t.
        memory_dim: width E of the memory, the encoder states h_s. Defaults to query_dim.
        score: "dot" (requires D = E), "general", "concat" or "location" (eq. 8 and the text below
            it). "location" is softmax(W_a h_t): its scores do not depend on the memory.
        attn_dim: width A of the concat score. Defaults to memory_dim.
        output_dim: if None, the layer returns the context c_t. If an int, it returns the
            attentional state h~_t = tanh(W_c [c_t; h_t]) of that width (eq. 5).
        output_bias: adds a bias to W_c, inside the tanh. Requires output_dim.
        bias: adds a bias to the query projection of "general", "concat" or "location".
        scale: factor of the scores (the inverse of a temperature). "learned" makes it a parameter,
            initialised to 1.
        local: None attends to all positions. "monotonic" attends to a window around p_t = t
            (local-m). "predictive" attends to a window around p_t = S sigmoid(v_p^T tanh(W_p h_t))
            and multiplies the weights by a Gaussian with sigma = window / 2 (local-p, eq. 9, 10).
        window: half-width of the window of local attention, in positions (the paper's D).
        dropout: probability of dropping an alignment weight in training mode.
        normalizer: "softmax", or "sparsemax", which sets small weights to exactly 0.
        weight_norm: concat only: replaces v by ``g v / |v|`` (Salimans & Kingma 2016). With
            bias=True this is the normalised Bahdanau attention of TensorFlow and GNMT.
        layer_norm: concat only: applies layer normalisation (Ba et al. 2016) to both projections
            before they are added, as Marian does.
        coverage: concat only: adds a term for the sum of the weights of all previous steps
            (See et al. 2017, eq. 11).
        conv_channels, conv_width: concat only: adds a term for a convolution of the previous
            step's weights (location-aware attention, Chorowski et al. 2015, eq. 8 and 9). With 0
            channels there is no such term.
        max_source: the maximum source length S, required by score "location".
        backend: "auto", "cpu", "cuda", "triton" or "eager".
        device, dtype: device and dtype of the parameters.

    Parameters, by option: ``query_proj.weight`` (general: (E, D), the transpose of W_a; concat:
    (A, D); location: (max_source, D)), ``memory_proj.weight`` (concat: (A, E)), ``v`` (concat:
    (A,)), ``output_proj.weight`` (output_dim, E + D), ``scale`` (), ``g`` (),
    ``query_proj.norm.weight``, ``memory_proj.norm.weight`` and ``memory_proj.norm.bias`` (A,),
    ``position.*`` (see `PredictedPosition`) and ``history.*`` (see `AlignmentHistory`).

    Raises TypeError or ValueError if an option is invalid or does not fit the others.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int | None = None,
        score: str = "general",
        *,
        attn_dim: int | None = None,
        output_dim: int | None = None,
        output_bias: bool = False,
        bias: bool = False,
        scale: float | str = 1.0,
        local: str | None = None,
        window: float = 10,
        dropout: float = 0.0,
        normalizer: str = "softmax",
        weight_norm: bool = False,
        layer_norm: bool = False,
        coverage: bool = False,
        conv_channels: int = 0,
        conv_width: int = 31,
        max_source: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        query_dim = options.check_size("query_dim", query_dim)
        memory_dim = options.check_optional_size("memory_dim", memory_dim) or query_dim
        attn_dim = options.check_optional_size("attn_dim", attn_dim)
        output_dim = options.check_optional_size("output_dim", output_dim)
        max_source = options.check_optional_size("max_source", max_source)
        options.check_score(score, query_dim, memory_dim, attn_dim, bias, max_source)
        options.check_output_bias(output_bias, output_dim)
        factor = options.check_scale(scale)
        window = options.check_local(local, window)
        parts = {"weight_norm": weight_norm, "layer_norm": layer_norm, "coverage": coverage}
        conv = options.check_concat_parts(score, parts, conv_channels, conv_width)
        options.check_choice("normalizer", normalizer, composed.NORMALIZERS)
        dropout = checks.probability("dropout", dropout)
        checks.check_backend(backend)
        self.query_dim = query_dim
        self.memory_dim = memory_dim
        self.score = score
        self.attn_dim = (attn_dim or memory_dim) if score == "concat" else None
        self.output_dim = output_dim
        self.local = local
        self.window = window
        self.dropout = dropout
        self.normalizer = normalizer
        self.max_source = max_source
        self.backend = backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale: float | nn.Parameter
        self.scale = nn.Parameter(torch.empty((), **where)) if factor is None else factor
        scored = {"general": memory_dim, "concat": self.attn_dim, "location": max_source}.get(score)
        self.layer_norm = layer_norm
        self.query_proj: nn.Linear
        self.memory_proj: nn.Linear
        if layer_norm and self.attn_dim is not None:
            self.query_proj = NormedLinear(query_dim, self.attn_dim, bias, False, **where)
            self.memory_proj = NormedLinear(memory_dim, self.attn_dim, False, True, **where)
        elif scored is not None:
            self.query_proj = nn.Linear(query_dim, scored, bias=bias, **where)
        if self.attn_dim is not None and not layer_norm:
            self.memory_proj = nn.Linear(memory_dim, self.attn_dim, bias=False, **where)
        if self.attn_dim is not None:
            self.v = nn.Parameter(torch.empty(self.attn_dim, **where))
        self.g = nn.Parameter(torch.empty((), **where)) if weight_norm else None
        self.position = PredictedPosition(query_dim, **where) if local == "predictive" else None
        self.history: AlignmentHistory | None = None
        if self.attn_dim is not None and (coverage or conv[0]):
            self.history = AlignmentHistory(self.attn_dim, coverage, *conv, **where)
        if output_dim is not None:
            both = memory_dim + query_dim
            self.output_proj = nn.Linear(both, output_dim, bias=output_bias, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the parameters: projections like `nn.Linear`, v like a row of its weight.

        A learned scale is set to 1, and the gain g of a normalised v to 1 / sqrt(A).
        """
        for name in ("query_proj", "memory_proj", "output_proj", "position", "history"):
            part = getattr(self, name, None)
            if part is not None:
                part.reset_parameters()
        if self.attn_dim is not None:
            bound = 1.0 / math.sqrt(self.attn_dim)
            nn.init.uniform_(self.v, -bound, bound)
            if self.g is not None:
                nn.init.constant_(self.g, bound)
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)

    @modules.beside_forward
    def prepare_memory(
        self,
        memory: Tensor | PackedSequence,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> PreparedMemory:
        """Do the work that is the same in every decoder step: checks, projection, exponentials.

        Takes memory, lengths and mask as `forward` does, and raises the same errors. Returns a
        `PreparedMemory` to pass as ``memory`` to `forward`, without lengths and mask.
        """
        states, memory_lengths = checks.padded(memory, memory_lengths)
        (states,) = checks.autocast(states)
        self._check_memory(states)
        lengths = checks.check_lengths(memory_lengths, states)
        checks.check_bounds(lengths, states)
        cube = isinstance(memory_mask, Tensor) and memory_mask.dim() == 3
        queries = memory_mask.shape[1] if memory_mask is not None and cube else 1
        mask = checks.check_mask(memory_mask, states, queries)
        lengths = None if lengths is None else lengths.to(torch.int64)
        mask = mask.unsqueeze(1) if mask is not None and not cube else mask
        if self.score != "concat":
            return PreparedMemory(self.score, states, None, None, lengths, mask)
        clean = zero_uncounted_rows(states, Masking(lengths, mask))
        proj = modules.project(self.memory_proj, clean, "memory")
        return PreparedMemory(self.score, states, proj, exponentials(proj), lengths, mask)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | PackedSequence | PreparedMemory,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        *,
        positions: int | Tensor | None = None,
        coverage: Tensor | None = None,
        previous_weights: Tensor | None = None,
        return_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``memory``.

        query: decoder states (B, T, D), (B, D) for one step, or (B, K, D) for K beams.
        memory: encoder states (B, S, E), or a `PackedSequence` or jagged nested tensor, which carry
            their own lengths, or the `PreparedMemory` that `prepare_memory` returned.
        memory_lengths: integers (B,) in 0..S. memory_mask: bool (B, S), (B, 1, S) or (B, T, S),
            **True = attend**. Both must be None with a `PreparedMemory`, which has its own.
        positions: for local="monotonic", the decoder step t of each query, counted from 0: one int,
            or a tensor that broadcasts to (B, T). None means 0..T-1; a 2-D query needs a value.
        coverage, previous_weights: (B, S) for one step, or (B, T, S) with one history per query.
            coverage (option coverage) is the sum of the weights of all previous steps;
            previous_weights (option conv_channels) are the weights of the previous step. Both are
            None at the first step.
        return_weights: whether to return the alignment weights.

        Returns the context (B, T, E), or the attentional state (B, T, output_dim), and the weights
        (B, T, S) or None. For a 2-D query the results have no T dimension. Raises TypeError for a
        wrong type or dtype, and ValueError for a wrong shape, device or value.
        """
        memory_exp: Tensor | None
        memory_proj: Tensor | None
        states: Any
        if type(query) is not Tensor and modules.is_proxy(query):
            masks = (memory_lengths, memory_mask)
            rest = {"positions": positions, "coverage": coverage}
            rest |= {"previous_weights": previous_weights, "return_weights": return_weights}
            return modules.as_node(self, query, memory, *masks, **rest)
        memory_proj = memory_exp = None
        if isinstance(memory, PreparedMemory):
            options.check_prepared(self, memory, memory_lengths, memory_mask)
            memory_proj, memory_exp = memory.memory_proj, memory.memory_exp
            memory_lengths, memory_mask = memory.memory_lengths, memory.memory_mask
            states = memory.memory
        else:
            states = memory
            if type(memory) is not Tensor or memory.is_nested:
                given = (memory_lengths, memory_mask, positions, coverage, previous_weights)
                rows = ragged.rows_of(memory, *given) if self._takes_rows() else None
                if rows is not None:
                    return self._attend_rows(query, rows, return_weights)
                states, memory_lengths = checks.padded(memory, memory_lengths)
        if positions is not None and self.local != "monotonic":
            raise ValueError(
                "positions must be None unless local='monotonic', got them with "
                f"local={self.local!r}"
            )
        dropout_p = self.dropout if self.training else 0.0
        v = self._vector() if self.score == "concat" else None
        masking: MaskingFields
        if (
            self.local is None
            and checks.is_usual(query, states, memory_lengths, memory_mask, None, dropout_p)
            and query.shape[-1] == self.query_dim
            and states.shape[2] == self.memory_dim
        ):
            masking = (memory_lengths, memory_mask, None, 1.0, None)
        else:
            query, states, memory_proj, v = checks.autocast(query, states, memory_proj, v)
            self._check_memory(states)
            checks.check_query(query, states, "query_dim", self.query_dim)
            memory_lengths = checks.check_lengths(memory_lengths, states)
            window = self._window(query, states, memory_lengths, positions)
            masking = checks.check_masking(
                query, states, memory_lengths, memory_mask, window, dropout_p
            )
        if v is not None and memory_proj is None:
            clean = zero_uncounted_rows(states, masking)
            memory_proj = modules.project(self.memory_proj, clean, "memory")
        operands = (self._scored(query, states), memory_proj, memory_exp, v, states, masking)
        context, weights = self._attend(operands, coverage, previous_weights, return_weights)
        return self._finished(context, query), weights

    def _takes_rows(self) -> bool:
        is_plain = self.local is None and self.normalizer == "softmax" and self.max_source is None
        return is_plain and not (self.training and self.dropout)

    def _attend_rows(
        self, query: Tensor, rows: ragged.Rows, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` for a jagged memory that does not have to be padded."""
        v = self._vector() if self.score == "concat" else None
        query, values, v = checks.autocast(query, rows.values, v)
        rows = rows._replace(values=values)
        self._check_memory(rows.stand_in())
        checks.check_query(query, rows.stand_in(), "query_dim", self.query_dim)
        scored, wanted = self._scored(query, values), (return_weights, self.backend)
        if v is None:
            context, weights = ragged.attend_dot(scored, rows, self.scale, *wanted)
        else:
            proj = modules.project(self.memory_proj, values, "memory")
            context, weights = ragged.attend_concat(scored, proj, v, rows, *wanted)
        return self._finished(context, query), weights

    def _finished(self, context: Tensor, query: Tensor) -> Tensor:
        """The context, or the attentional state if there is an output layer."""
        if self.output_dim is None:
            return context
        both = torch.cat((context, query), dim=-1)
        return torch.tanh(modules.project(self.output_proj, both, "query"))

    @modules.beside_forward
    def scores(
        self,
        query: Tensor,
        memory: Tensor | PackedSequence | PreparedMemory,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        *,
        positions: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scaled scores before the normalizer, and their log-sum-exp.

        Takes query, memory, lengths, mask and positions as `forward` does. Coverage and location
        terms are left out. Returns the scores (B, T, S), -inf at masked positions, and the
        log-sum-exp (B, T), both in float32 (float64 for float64). For a 2-D query the results have
        no T dimension. Raises the same errors as `forward`.
        """
        states: Any
        prepared = memory if isinstance(memory, PreparedMemory) else None
        if prepared is not None:
            options.check_prepared(self, prepared, memory_lengths, memory_mask)
            memory_lengths, memory_mask = prepared.memory_lengths, prepared.memory_mask
            states = prepared.memory
        else:
            states, memory_lengths = checks.padded(memory, memory_lengths)
        v = self._vector() if self.score == "concat" else None
        query, states, v = checks.autocast(query, states, v)
        self._check_memory(states)
        checks.check_query(query, states, "query_dim", self.query_dim)
        memory_lengths = checks.check_lengths(memory_lengths, states)
        window = self._window(query, states, memory_lengths, positions)
        masking = checks.check_masking(query, states, memory_lengths, memory_mask, window, 0.0)
        proj = exp = None
        if v is not None and prepared is not None:
            (proj,), exp = checks.autocast(prepared.memory_proj), prepared.memory_exp
        elif v is not None:
            clean = zero_uncounted_rows(states, masking)
            proj = modules.project(self.memory_proj, clean, "memory")
        found = self._scores(self._scored(query, states), proj, exp, v, states, masking)
        log = composed.log_sum_exp(found)
        return (found, log) if query.dim() == 3 else (found.squeeze(1), log.squeeze(1))

    def _attend(
        self,
        operands: tuple[Any, ...],
        coverage: Tensor | None,
        previous_weights: Tensor | None,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scored, _, _, v, states, masking = operands
        batch, queries = scored.shape[0], None
        if coverage is not None or previous_weights is not None:
            if self.history is None:
                raise ValueError(
                    "coverage and previous_weights must be None unless the layer was created with "
                    "coverage=True or conv_channels"
                )
            operands, queries = fold_history(self.history, operands, coverage, previous_weights)
            scored, _, _, v, states, masking = operands
        if self.score == "location" or self.normalizer != "softmax":
            found = self._scores(*operands)
            normalized = (masking, self.normalizer, return_weights)
            context, weights = composed.attend_scores(found, states, *normalized)
            if scored.dim() == 2:
                context, weights = functional.one_step(context, weights)
        elif v is None:
            rest = (masking, return_weights, self.backend)
            context, weights = functional.attend_dot(scored, states, self.scale, *rest)
        else:
            arguments: tuple[Any, ...] = (*operands, return_weights, self.backend)
            context, weights = functional.attend_concat(*arguments)
        if queries is None:
            return context, weights
        # All sizes are given: torch cannot infer a -1 for a tensor without elements.
        unfolded = None if weights is None else weights.reshape(batch, queries, weights.shape[-1])
        return context.reshape(batch, queries, context.shape[-1]), unfolded

    def _scored(self, query: Tensor, states: Tensor) -> Tensor:
        """The query as the score uses it: projected, unless the score is "dot".

        For "location" the projection gives the scores themselves; only the first S are kept.
        """
        if self.score == "dot":
            return query
        if self.max_source is None:
            return modules.project(self.query_proj, query, "query")
        source = states.shape[1]
        if source > self.max_source:
            raise ValueError(
                f"memory must have S <= max_source = {self.max_source}, got S={source}"
            )
        weight = modules.readable_weight(self.query_proj)
        if weight is None:  # a wrapped module must be called, with all of its outputs
            return modules.project(self.query_proj, query, "query")[..., :source]
        bias = self.query_proj.bias
        rows = (weight[:source], None if bias is None else bias[:source])
        return modules.project(self.query_proj, query, "query", rows)

    def _scores(
        self,
        scored: Tensor,
        memory_proj: Tensor | None,
        memory_exp: Tensor | None,
        v: Tensor | None,
        states: Tensor,
        masking: MaskingFields,
    ) -> Tensor:
        """Scores (B, T, S) in the dtype of the arithmetic, -inf at masked positions."""
        if scored.dim() == 2:
            scored = scored.unsqueeze(1)
        if v is not None:
            assert memory_proj is not None
            return scores.of_concat(scored, memory_proj, memory_exp, v, masking, self.backend)
        if self.score == "location":
            return scores.counted(self._scaled(scored), states, masking)
        return scores.of_dot(scored, states, self.scale, masking)

    def _scaled(self, tensor: Tensor) -> Tensor:
        scale = self.scale
        if isinstance(scale, Tensor):
            return tensor * scale.to(tensor.dtype)
        return tensor if scale == 1.0 else tensor * scale

    def _vector(self) -> Tensor:
        """v of the concat score with gain and scale: ``scale g v / |v|``."""
        v = self.v if self.g is None else self.v * (self.g / torch.linalg.vector_norm(self.v))
        return self._scaled(v)

    def _window(
        self,
        query: Tensor,
        states: Tensor,
        lengths: Tensor | None,
        positions: int | Tensor | None,
    ) -> LocalWindow | None:
        if self.local is None:
            return None
        if self.position is not None:
            centers = self.position(query, lengths, states.shape[1])
            return LocalWindow(centers, self.window, gaussian=True)
        return LocalWindow(monotonic_centers(query, positions), self.window)

    def warm_up(
        self,
        query: Tensor,
        memory: Tensor | PackedSequence | PreparedMemory,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        *,
        positions: int | Tensor | None = None,
        return_weights: bool = True,
    ) -> None:
        """Run one call of these shapes, so that a CUDA graph can capture later ones.

        Takes the arguments of `forward`, on the device where it will run. Compiles and loads the
        kernels of the forward pass and, if an input or parameter requires a gradient, of the
        backward pass. The results are discarded: no gradient is accumulated, and the state of the
        random number generators does not change. Raises the same errors as `forward`.
        """
        wanted = {"positions": positions, "return_weights": return_weights}
        warm_up.run(self, query, memory, (memory_lengths, memory_mask), wanted)

    def _check_memory(self, memory: Tensor) -> None:
        checks.check_memory(memory)
        if memory.shape[2] != self.memory_dim:
            raise ValueError(
                f"memory must have shape (B, S, {self.memory_dim}), got {tuple(memory.shape)}"
            )

    def extra_repr(self) -> str:
        return options.describe(self)
