"""The model: embeddings, encoder, bridge, decoder with attention, and output layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_attn.composed import coverage_loss
from fused_attn.prepared import PreparedMemory
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.data.soft_targets import SoftTargets
from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.model.decoder import Decoder, DecoderState
from fused_attn.seq2seq.model.encoder import Bridge, Encoder
from fused_attn.seq2seq.model.losses import (
    entropy,
    guided_alignment_loss,
    rdrop_loss,
    soft_target_loss,
)
from fused_attn.seq2seq.model.recurrent import Dropout, Stack
from fused_attn.seq2seq.vocabulary import PAD


class Seq2Seq(nn.Module):
    """An attentional encoder-decoder over symbol ids.

    Args:
        config: shape of the model.
        source_size, target_size: sizes of the vocabularies, special symbols included.
        backend: backend of the attention, "auto" or a name. "eager" also keeps searches in torch.

    Raises TypeError if a size is not an int, ValueError if all embeddings are tied (``config.tie ==
    "all"``) and the vocabulary sizes differ.
    """

    def __init__(
        self, config: ModelConfig, source_size: int, target_size: int, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        for name, size in (("source_size", source_size), ("target_size", target_size)):
            if not isinstance(size, int):
                raise TypeError(
                    f"{name} must be the size of a vocabulary, an int, got {type(size).__name__}"
                )
        self.config = config
        self.backend = backend
        if config.tie == "all" and source_size != target_size:
            raise ValueError(
                "tie all needs one vocabulary for source and target, "
                f"got {source_size} and {target_size} symbols"
            )
        self.target_embedding = nn.Embedding(target_size, config.embedding, padding_idx=PAD)
        self.source_embedding = (
            self.target_embedding
            if config.tie == "all"
            else nn.Embedding(source_size, config.embedding, padding_idx=PAD)
        )
        width = config.hidden if config.encoder_hidden is None else config.encoder_hidden
        encoder = Stack(
            config,
            config.embedding,
            width,
            config.encoder_depth,
            bidirectional=config.bidirectional,
        )
        fed = config.embedding + (config.hidden if config.input_feeding else 0)
        decoder = encoder if config.share else Stack(config, fed, config.hidden, config.layers)
        self.encoder = Encoder(config, encoder)
        self.bridge = Bridge(config, config.memory_dim)
        # The dot score multiplies h_t and h_s directly, so their widths must agree.
        narrow = config.score == "dot" and config.memory_dim != config.hidden
        self.memory_proj = (
            nn.Linear(config.memory_dim, config.hidden, bias=False) if narrow else nn.Identity()
        )
        memory_dim = config.hidden if narrow else config.memory_dim
        self.decoder = Decoder(config, decoder, memory_dim, backend)
        # With tied embeddings the output layer has the width of the embedding.
        between = config.tie is not None and config.embedding != config.hidden
        self.output_proj = (
            nn.Linear(config.hidden, config.embedding, bias=False) if between else nn.Identity()
        )
        width = config.embedding if config.tie is not None else config.hidden
        self.output = nn.Linear(width, target_size)
        if config.tie is not None:
            self.output.weight = self.target_embedding.weight
        self.dropout = Dropout(config.dropout, config.variational)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, DecoderState]:
        """Encode the source.

        source: int64 (B, S), padded at the end.
        lengths: int64 (B,), 1..S, in any order. Keep them on the CPU even if the source is on a
            GPU: otherwise the host waits for the GPU to read them.

        Returns the memory (B, S, E) and the initial decoder state.
        """
        embedded = self.dropout(self.source_embedding(source))
        on_device = moved(lengths, source.device)
        memory, final = self.encoder(embedded, on_device, lengths.cpu())
        hidden = self.bridge(memory, on_device, final)
        return self.memory_proj(memory), self.decoder.start(hidden, source.shape[1])

    def decode(
        self,
        inputs: Tensor,
        state: DecoderState,
        memory: Tensor | PreparedMemory | None,
        memory_lengths: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Run the decoder over given symbols: all of a target in training, one in search.

        inputs: int64 (N, T), the symbols that precede those to predict. N is B; if T is 1, it may
            be B K for K beams per sentence, the beams of a sentence next to one another.
        state: from `encode`, or from the previous call.
        memory, memory_lengths: as `LuongAttention` takes them.

        Returns the logits (N, T, target_size), the next state, and the alignment weights
        (N, T, S), or None if not asked for.
        """
        embedded = self.dropout(self.target_embedding(inputs))
        attentional, state, weights = self.decoder(
            embedded, state, memory, memory_lengths, return_weights=return_weights
        )
        return self.output(self.output_proj(self.dropout(attentional))), state, weights

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        inputs: Tensor,
        *,
        sampling: float = 0.0,
        sampling_per: str = "token",
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, target_size) and the alignment weights (B, T, S) or None.

        Row t of the logits predicts the symbol that follows ``inputs[:, t]``.

        source, source_lengths: int64 (B, S) and (B,), see `encode`.
        inputs: int64 (B, T), starting with BOS.
        sampling: probability of feeding the decoder its own most probable symbol instead of the one
            in ``inputs`` (scheduled sampling, Bengio et al. 2015); 0 is teacher forcing.
        sampling_per: "token" draws independently for each step of each sentence, "example" once per
            sentence, for all of its steps.
        """
        memory, state = self.encode(source, source_lengths)
        source_lengths = moved(source_lengths, source.device)
        if sampling == 0.0:
            logits, _, weights = self.decode(
                inputs, state, memory, source_lengths, return_weights=return_weights
            )
            return logits, weights
        # Project the memory once for all steps.
        prepared = self.prepare_memory(memory, source_lengths)
        drawn = inputs.shape if sampling_per == "token" else (inputs.shape[0], 1)
        own = (torch.rand(drawn, device=inputs.device) < sampling).expand_as(inputs)
        steps: list[Tensor] = []
        alignments: list[Tensor] = []
        for t in range(inputs.shape[1]):
            given = inputs[:, t : t + 1]
            if steps:
                given = torch.where(own[:, t : t + 1], steps[-1].argmax(dim=-1), given)
            logits, state, weights = self.decode(
                given, state, prepared, return_weights=return_weights
            )
            steps.append(logits)
            if weights is not None:
                alignments.append(weights)
        return torch.cat(steps, dim=1), torch.cat(alignments, dim=1) if alignments else None

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target: Tensor,
        *,
        sampling: float = 0.0,
        sampling_per: str = "token",
        label_smoothing: float = 0.0,
        coverage_weight: float = 0.0,
        alignment: Tensor | None = None,
        guided_weight: float = 0.0,
        rdrop: float = 0.0,
        soft_targets: SoftTargets | None = None,
        teacher_weight: float = 0.5,
        tokens: int | None = None,
    ) -> Tensor:
        """Return the mean loss per target symbol in nats, a scalar; padding does not count.

        The loss is the cross-entropy of the target, plus ``coverage_weight`` times the coverage
        loss of each step, plus ``guided_weight`` times the cross-entropy of the alignment weights
        and ``alignment`` (Chen et al. 2016, eq. 4).

        source, source_lengths, sampling, sampling_per: see `forward`.
        target: int64 (B, T + 1), from BOS to EOS, padded at the end.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        alignment: (B, T, S), the known attention weights of each target symbol. Rows of zeros do
            not count.
        rdrop: alpha of R-Drop (Liang et al. 2021, eq. 4). Every pair passes through the model twice
            with different dropout, and the divergence of the two predictions is penalised. The loss
            is half of eq. 4, so that alpha 0 is the loss without R-Drop.
        soft_targets: the teachers' probabilities. The cross-entropy is then ``teacher_weight``
            times that of the soft targets plus ``1 - teacher_weight`` times that of the target (Kim
            & Rush 2016, section 2.2).
        tokens: number of symbols to divide by, if these pairs are part of a larger batch; None
            means the symbols of ``target``.
        """
        if rdrop > 0.0:
            tokens = int((target[:, 1:] != PAD).sum()) if tokens is None else tokens
            source, source_lengths, target = (
                torch.cat([once, once]) for once in (source, source_lengths, target)
            )
            alignment = None if alignment is None else torch.cat([alignment, alignment])
            soft_targets = None if soft_targets is None else soft_targets.twice()
        inputs, expected = target[:, :-1], target[:, 1:]
        covers, guided = coverage_weight > 0.0, guided_weight > 0.0 and alignment is not None
        logits, weights = self(
            source,
            source_lengths,
            inputs,
            sampling=sampling,
            sampling_per=sampling_per,
            return_weights=covers or guided,
        )
        loss = entropy(logits, expected, label_smoothing)
        if soft_targets is not None:
            soft = soft_target_loss(logits, soft_targets)
            loss = (1.0 - teacher_weight) * loss + teacher_weight * soft
        if covers:
            repeated = coverage_loss(weights).masked_fill(expected == PAD, 0.0).sum()
            loss = loss + coverage_weight * repeated
        if guided:
            assert alignment is not None
            loss = loss + guided_weight * guided_alignment_loss(weights, alignment)
        if rdrop > 0.0:
            loss = 0.5 * (loss + rdrop * rdrop_loss(logits, expected))
        return loss / ((expected != PAD).sum() if tokens is None else tokens)

    def prepare_memory(self, memory: Tensor, lengths: Tensor) -> PreparedMemory | None:
        """Return the memory (B, S, E) with the parts of the attention that no step changes.

        Returns None if the model has no attention.
        """
        attention = self.decoder.attention
        return None if attention is None else attention.prepare_memory(memory, lengths)
