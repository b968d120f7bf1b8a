"""The module: parameters, and one call of the operator.

Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import checks, functional
from fused_attn.problem import SCORES
from fused_attn.reference import Masking, MaskingFields, arithmetic_dtype, zero_uncounted_rows

# Beyond this a projection is so large that exp(2x) leaves float32; see `exponentials`.
_LARGEST_EXPONENT = 43.0


def exponentials(memory_proj: Tensor) -> Tensor:
    """Return ``exp(2 m)`` for a memory projection m (B, S, A), and -1 where that would overflow.

    With E = exp(2q) exp(2m), tanh(q + m) = 1 - 2 / (1 + E): a decoding step then needs no
    exponential of the memory. A kernel that meets the mark -1 reads m itself instead. Held in
    bfloat16 for bfloat16 (its range is float32's, and a relative error of the exponential is an
    absolute error of m), in float32 for float32 and float16.
    """
    dtype = memory_proj.dtype
    wide = memory_proj.detach().to(arithmetic_dtype(dtype))
    exp = torch.where(wide.abs() <= _LARGEST_EXPONENT, torch.exp(2.0 * wide), -1.0)
    return exp if dtype == torch.float16 else exp.to(dtype)


@dataclass(frozen=True, eq=False)
class PreparedMemory:
    """A memory with everything that does not depend on the query, made by `prepare_memory`.

    An immutable value: pass it to `LuongAttention.forward` in place of the memory, as often as the
    decoder steps. Gradients flow through it. Nothing is kept on the module.
    """

    score: str
    memory: Tensor  # (B, S, E)
    memory_proj: Tensor | None = None  # (B, S, A), concat only
    memory_exp: Tensor | None = None  # (B, S, A), `exponentials` of memory_proj
    memory_lengths: Tensor | None = None  # int64 (B,)
    memory_mask: Tensor | None = None  # bool (B, 1 or T, S)

    def index_select(self, rows: Tensor) -> PreparedMemory:
        """Return the rows ``rows`` (int, (N,)) of the batch, as a reordered batch needs them.

        Beams of one sentence need no copy of its memory: give them as a query (B, K, D).
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point():
            raise TypeError(f"rows must be an integer Tensor of shape (N,), got {rows!r}")
        names = ("memory", "memory_proj", "memory_exp", "memory_lengths", "memory_mask")
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{k: t.index_select(0, rows) for k, t in tensors.items() if t is not None},
        )


class LuongAttention(nn.Module):
    """Attention of decoder states over encoder states, with the score of your choice.

    Args:
        query_dim: width D of the query, the decoder state h_t.
        memory_dim: width E of the memory, the encoder states h_s; query_dim if None.
        score: "dot" (needs D = E), "general" or "concat".
        attn_dim: width A of the concat score; memory_dim if None.
        output_dim: None returns the context c_t. A width returns the attentional state
            h~_t = tanh(W_c [c_t; h_t]) of that width (eq. 5 of the paper).
        bias: give the query projection of "general" or "concat" a bias.
        scale: number the scores of "dot" and "general" are multiplied with.
        local, window: local attention; only local=None so far.
        dropout: probability of dropping an alignment weight while training.
        backend: "auto", or the name of a backend.
        device, dtype: of the parameters.

    Parameters: ``query_proj.weight`` (general: (E, D), so that W_a is its transpose; concat:
    (A, D)), ``memory_proj.weight`` (concat: (A, E)), ``v`` (concat: (A,)) and
    ``output_proj.weight`` (output_dim, E + D).
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int | None = None,
        score: str = "general",
        *,
        attn_dim: int | None = None,
        output_dim: int | None = None,
        bias: bool = False,
        scale: float | str = 1.0,
        local: str | None = None,
        window: int = 10,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        memory_dim = query_dim if memory_dim is None else memory_dim
        sizes = {"query_dim": query_dim, "memory_dim": memory_dim}
        sizes |= {"attn_dim": attn_dim} if attn_dim is not None else {}
        sizes |= {"output_dim": output_dim} if output_dim is not None else {}
        _check_options(sizes, score, attn_dim, bias, scale, local, dropout)
        checks.check_backend(backend)
        self.query_dim = query_dim
        self.memory_dim = memory_dim
        self.score = score
        self.attn_dim = (attn_dim or memory_dim) if score == "concat" else None
        self.output_dim = output_dim
        self.scale = float(scale)
        self.dropout = dropout
        self.backend = backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if score == "general":
            self.query_proj = nn.Linear(query_dim, memory_dim, bias=bias, **where)
        elif self.attn_dim is not None:
            self.query_proj = nn.Linear(query_dim, self.attn_dim, bias=bias, **where)
            self.memory_proj = nn.Linear(memory_dim, self.attn_dim, bias=False, **where)
            self.v = nn.Parameter(torch.empty(self.attn_dim, **where))
        if output_dim is not None:
            self.output_proj = nn.Linear(memory_dim + query_dim, output_dim, bias=False, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again: the projections as `nn.Linear` does, v as one row of it."""
        for name in ("query_proj", "memory_proj", "output_proj"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()
        if self.attn_dim is not None:
            bound = 1.0 / math.sqrt(self.attn_dim)
            nn.init.uniform_(self.v, -bound, bound)

    def prepare_memory(
        self,
        memory: Tensor,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> PreparedMemory:
        """Do once what every step of a decoder would do again: checks, projection, exponentials.

        Arguments as in `forward`. Returns a `PreparedMemory` to pass in place of the memory.
        """
        (memory,) = checks.autocast(memory)
        self._check_memory(memory)
        lengths = checks.check_lengths(memory_lengths, memory)
        cube = isinstance(memory_mask, Tensor) and memory_mask.dim() == 3
        queries = memory_mask.shape[1] if memory_mask is not None and cube else 1
        mask = checks.check_mask(memory_mask, memory, queries)
        lengths = None if lengths is None else lengths.to(torch.int64)
        mask = mask.unsqueeze(1) if mask is not None and not cube else mask
        if self.score != "concat":
            return PreparedMemory(self.score, memory, None, None, lengths, mask)
        proj = self.memory_proj(zero_uncounted_rows(memory, Masking(lengths, mask)))
        return PreparedMemory(self.score, memory, proj, exponentials(proj), lengths, mask)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | PreparedMemory,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        *,
        return_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        query: (B, T, D) decoder states, or (B, D) for one step, or (B, K, D) for K beams.
        memory: (B, S, E) encoder states, or what `prepare_memory` made of them.
        memory_lengths: int (B,), 0..S; memory_mask: bool (B, S), (B, 1, S) or (B, T, S),
            **True = attend**. Neither goes with a prepared memory, which holds its own.
        return_weights: whether to return the alignment weights.

        Returns the context (B, T, E), or the attentional state (B, T, output_dim), and the weights
        (B, T, S) or None; without the T for a 2-D query. Raises TypeError or ValueError that names
        the argument, what was expected and what came.
        """
        memory_proj = memory_exp = None
        if isinstance(memory, PreparedMemory):
            self._check_prepared(memory, memory_lengths, memory_mask)
            memory_proj, memory_exp = memory.memory_proj, memory.memory_exp
            memory_lengths, memory_mask = memory.memory_lengths, memory.memory_mask
            states = memory.memory
        else:
            states = memory
        dropout_p = self.dropout if self.training else 0.0
        v = self.v if self.score == "concat" else None
        masking: MaskingFields
        if (
            checks.is_usual(query, states, memory_lengths, memory_mask, None, dropout_p)
            and query.shape[-1] == self.query_dim
            and states.shape[2] == self.memory_dim
        ):
            masking = (memory_lengths, memory_mask, None, 1.0)
        else:
            query, states, memory_proj, v = checks.autocast(query, states, memory_proj, v)
            self._check_memory(states)
            checks.check_query(query, states, "query_dim", self.query_dim)
            masking = checks.check_masking(
                query, states, memory_lengths, memory_mask, None, dropout_p
            )
        rest = (masking, return_weights, self.backend)
        if v is None:
            scored = query if self.score == "dot" else self.query_proj(query)
            context, weights = functional.attend_dot(scored, states, self.scale, *rest)
        else:
            if memory_proj is None:
                memory_proj = self.memory_proj(zero_uncounted_rows(states, masking))
            inputs = (self.query_proj(query), memory_proj, memory_exp, v, states)
            context, weights = functional.attend_concat(*inputs, *rest)
        if self.output_dim is not None:
            context = torch.tanh(self.output_proj(torch.cat((context, query), dim=-1)))
        return context, weights

    def warm_up(
        self,
        query: Tensor,
        memory: Tensor | PreparedMemory,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        *,
        return_weights: bool = True,
    ) -> None:
        """Run once what calls of these shapes run, so that a CUDA graph can capture the next one.

        Arguments as in `forward`, on the device where it will run. Compiles and loads kernels for
        the forward and, where gradients would flow, for the backward. The results are dropped:
        no gradient is accumulated and no random state moves.
        """

        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value  # forward says what is wrong with it
            leaves.append(value.detach().requires_grad_(value.requires_grad))
            return leaves[-1]

        if isinstance(memory, PreparedMemory):
            states, proj = leaf(memory.memory), leaf(memory.memory_proj)
            memory = replace(memory, memory=states, memory_proj=proj)
        else:
            memory = leaf(memory)
        query = leaf(query)
        on_gpu = isinstance(query, Tensor) and query.is_cuda
        with torch.random.fork_rng(devices=[query.device] if on_gpu else []):
            rest = (memory_lengths, memory_mask)
            output, weights = self(query, memory, *rest, return_weights=return_weights)
        inputs = [x for x in (*leaves, *self.parameters()) if x.requires_grad]
        roots = [x for x in (output, weights) if x is not None and x.requires_grad]
        for count in range(1, len(roots) + 1):  # a loss may use the weights, or not
            seeds = [torch.ones_like(root) for root in roots[:count]]
            torch.autograd.grad(roots[:count], inputs, seeds, retain_graph=True, allow_unused=True)

    def _check_memory(self, memory: Tensor) -> None:
        checks.check_memory(memory)
        if memory.shape[2] != self.memory_dim:
            raise ValueError(
                f"memory must have shape (B, S, {self.memory_dim}), got {tuple(memory.shape)}"
            )

    def _check_prepared(
        self, memory: PreparedMemory, memory_lengths: object, memory_mask: object
    ) -> None:
        if memory_lengths is not None or memory_mask is not None:
            raise ValueError(
                "memory_lengths and memory_mask belong to prepare_memory when memory is a "
                "PreparedMemory, got them in forward"
            )
        if memory.score != self.score:
            raise ValueError(
                f"memory was prepared for the score {memory.score!r}, expected {self.score!r}"
            )
        if memory.memory_proj is not None and memory.memory_proj.shape[2] != self.attn_dim:
            raise ValueError(
                f"memory was prepared for attn_dim {memory.memory_proj.shape[2]}, "
                f"expected {self.attn_dim}"
            )

    def extra_repr(self) -> str:
        parts = [f"{self.query_dim}, {self.memory_dim}, score={self.score!r}"]
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def _check_options(
    sizes: dict[str, int],
    score: str,
    attn_dim: int | None,
    bias: bool,
    scale: float | str,
    local: str | None,
    dropout: float,
) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    if score == "dot" and sizes["query_dim"] != sizes["memory_dim"]:
        raise ValueError(
            "score 'dot' needs query_dim == memory_dim, "
            f"got {sizes['query_dim']} and {sizes['memory_dim']}"
        )
    if attn_dim is not None and score != "concat":
        raise ValueError(
            f"attn_dim belongs to score 'concat', got attn_dim={attn_dim} for {score!r}"
        )
    if bias and score == "dot":
        raise ValueError("bias needs a query projection (score 'general' or 'concat'), got 'dot'")
    if scale == "learned":
        raise NotImplementedError("scale='learned' is not implemented yet; use a number")
    if not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if score == "concat" and scale != 1.0:
        raise ValueError(
            f"scale belongs to the scores 'dot' and 'general', got {scale!r} for concat"
        )
    if local is not None:
        raise NotImplementedError(f"local attention is not implemented yet, got local={local!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability in 0..1, got {dropout!r}")
