"""The configurations of a run: the shape of the model, the recipe of the training, the search.

Plain values, checked on creation; the command line shows their defaults. This module does not
import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fused_attn.choices import LAYER_SCORES, LOCALS

CELLS = ("lstm", "gru", "rnn")
SCORES = (*LAYER_SCORES, "none")
BRIDGES = ("zero", "last", "mean", "dense")
TIES = ("output", "all")
SCHEDULES = ("none", "constant", "linear", "exponential", "inverse-sigmoid")
SAMPLING_UNITS = ("token", "example")
LR_SCHEDULES = ("linear", "cosine", "constant", "inverse-sqrt", "plateau")
PRECISIONS = ("32", "bf16", "16")
# No size, length or number of epochs is larger. Torch reads sizes as 64-bit integers.
LARGEST_INT = 2**31 - 1
LENGTH_PENALTIES = ("none", "average", "gnmt")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `Seq2Seq` model.

    cell: recurrent cell of the encoder and the decoder: "lstm", "gru" or "rnn" (tanh).
    hidden: width D of the decoder state and of the attentional state.
    encoder_hidden: width of each direction of the encoder; hidden if None.
    embedding: width of the embeddings of source and target symbols.
    layers: number of recurrent layers of the decoder.
    encoder_layers: number of recurrent layers of the encoder; layers if None.
    bidirectional: also read the source from its end; the memory is then twice as wide.
    residual: add a recurrent layer's input to its output where they are equally wide.
    share: use the same recurrent layers in the encoder and the decoder.
    tie: None; "output" shares the weights of the target embedding and the output layer; "all" uses
        one embedding for source, target and output, which then have one vocabulary.
    reverse_source: read the source from its end (Sutskever et al. 2014).
    bridge: initial state of the decoder: "zero", "last", "mean" or "dense"; see `Bridge`.
    score: attention score, or "none" for a decoder that sees the source through the bridge only.
        "dot" first projects the memory to the decoder's width where they differ.
    attn_dim: width of the concat score; the width of the memory if None.
    local, window: local attention, "monotonic" or "predictive", and its half-width.
    max_source: longest source in symbols, for the score "location".
    coverage: add the sum of the earlier attention weights to the concat score.
    input_feeding: feed h~ of a step into the next one (Luong et al. 2015, section 3.3).
    dropout: probability, on embeddings, between layers and on the attentional state.
    variational: use one dropout mask for all steps of a sequence.

    Raises ValueError if a value is not allowed, or if values contradict one another.
    """

    cell: str = "lstm"
    hidden: int = 256
    encoder_hidden: int | None = None
    embedding: int = 64
    layers: int = 1
    encoder_layers: int | None = None
    bidirectional: bool = True
    residual: bool = False
    share: bool = False
    tie: str | None = None
    reverse_source: bool = False
    bridge: str = "dense"
    score: str = "general"
    attn_dim: int | None = None
    local: str | None = None
    window: int = 10
    max_source: int | None = None
    coverage: bool = False
    input_feeding: bool = False
    dropout: float = 0.2
    variational: bool = False

    def __post_init__(self) -> None:
        _check_choice("cell", self.cell, CELLS)
        _check_choice("score", self.score, SCORES)
        _check_choice("bridge", self.bridge, BRIDGES)
        for name, choices in (("local", LOCALS), ("tie", TIES)):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), choices)
        for name in ("hidden", "embedding", "layers", "window"):
            _check_positive(name, getattr(self, name))
        for name in ("encoder_hidden", "encoder_layers", "attn_dim", "max_source"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse values that contradict one another."""
        for name, needed in (("attn_dim", "concat"), ("coverage", "concat")):
            if getattr(self, name) and self.score != needed:
                raise ValueError(f"{name} belongs to the score {needed}, got {self.score!r}")
        if self.score == "location" and self.max_source is None:
            raise ValueError("max_source must be given for the score location")
        if self.local is not None and self.score == "none":
            raise ValueError(f"local needs a score, got local={self.local!r} for the score none")
        memory = self.memory_dim
        if self.bridge == "last" and memory != self.hidden:
            raise ValueError(
                f"bridge last needs a memory as wide as the decoder, {self.hidden}, got {memory}"
            )
        if self.share and not (
            memory == self.hidden
            and not self.bidirectional
            and self.encoder_depth == self.layers
            and not self.input_feeding
        ):
            raise ValueError(
                "share needs an encoder and a decoder of the same shape: one direction, equal "
                "widths and layers, no input feeding"
            )

    @property
    def encoder_depth(self) -> int:
        """Layers of the encoder."""
        return self.layers if self.encoder_layers is None else self.encoder_layers

    @property
    def memory_dim(self) -> int:
        """Width of the encoder's output."""
        hidden = self.hidden if self.encoder_hidden is None else self.encoder_hidden
        return hidden * (2 if self.bidirectional else 1)


@dataclass(frozen=True)
class TrainingConfig:
    """Options of a training run.

    epochs: passes over the training pairs; the schedule of the learning rate spans them.
    batch_size: pairs in a batch.
    bucket: group sources of equal length into a batch: faster steps, with less variety in each.
    batch_tokens: symbols in a batch (source, target and padding), instead of batch_size.
    accumulate: number of parts into which a batch is split, to save memory.
    precision: "32"; "bf16" or "16" for mixed precision: parameters, their updates and the sums of
        the attention stay in float32.
    lr: peak learning rate of Adam, reached after the warm-up.
    lr_schedule: the learning rate after the warm-up: "linear" or "cosine" to 0; "constant";
        "inverse-sqrt" of the step; "plateau", halved after each epoch whose development error is
        not the lowest so far. The development error is the first measure on the development set.
    warmup: share of all steps in which the learning rate rises to ``lr``.
    patience: stop after this many epochs without a new lowest development error; None for never.
    clip: maximum norm of the gradient.
    label_smoothing: share of the probability that is spread over all symbols.
    coverage_loss: weight of the coverage loss (See et al. 2017), for a model with attention.
    guided: weight of the guided alignment loss (Chen et al. 2016), for pairs with links.
    rdrop: weight of the difference between two passes of a pair under different dropout (R-Drop,
        Liang et al. 2021, who use 5 for translation); 0 for one pass, in half the time.
    teacher_weight: share of the loss that comes from the teachers, if there are any.
    sampling: schedule of the probability that the decoder is given its own symbol instead of the
        right one: "none" (teacher forcing), "constant", "linear", "exponential" or
        "inverse-sigmoid" (Bengio et al. 2015).
    sampling_per: what is drawn for: each "token", or each "example" as a whole.
    sampling_max: the final value of that probability.
    sampling_after: start scheduled sampling when the development error is at most this (BLEU
        counts as negative, so that lower is better); None for at once.
    seed: seed of the parameters, the dropout and the order of the pairs.
    max_steps: stop after this many steps, and plan the schedules for them; None for all epochs.

    Raises ValueError if a value is not allowed.
    """

    epochs: int = 10
    batch_size: int = 128
    bucket: bool = True
    batch_tokens: int | None = None
    accumulate: int = 1
    precision: str = "32"
    lr: float = 2e-3
    lr_schedule: str = "linear"
    warmup: float = 0.05
    patience: int | None = None
    clip: float = 1.0
    label_smoothing: float = 0.0
    coverage_loss: float = 0.0
    guided: float = 0.0
    rdrop: float = 0.0
    teacher_weight: float = 0.5
    sampling: str = "none"
    sampling_per: str = "token"
    sampling_max: float = 0.25
    sampling_after: float | None = None
    seed: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _check_positive(name, getattr(self, name))
        for name in ("max_steps", "batch_tokens", "patience"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.batch_tokens is not None and not self.bucket:
            raise ValueError("bucket must be left on for batches by symbols, got False")
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("warmup", "sampling_max"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be a share in 0..1, got {getattr(self, name)!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}"
            )
        for name in ("coverage_loss", "guided", "rdrop"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if not 0.0 < self.teacher_weight <= 1.0:
            raise ValueError(
                f"teacher_weight must be above 0 and at most 1, got {self.teacher_weight!r}"
            )
        _check_choice("sampling", self.sampling, SCHEDULES)
        _check_choice("sampling_per", self.sampling_per, SAMPLING_UNITS)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed!r}")


@dataclass(frozen=True)
class SearchConfig:
    """How to search for a target.

    beam: beam size; 1 takes the likeliest symbol at every step.
    nbest: hypotheses returned for each source, the best first; at most beam.
    nbest_mass: return only the fewest of the best hypotheses whose probabilities add up to at
        least this share, above 0 and at most 1: at most nbest of them if that is above 1, else at
        most beam. The probabilities are the model's own. None does not limit the number this way.
    length_penalty: what the log-probability is divided by: "none"; "average", the length; "gnmt",
        ((5 + length) / 6)^alpha (Wu et al. 2016, eq. 14). EOS counts.
    alpha: the exponent of "gnmt".
    coverage_penalty: beta of the same equation, for source positions that were not attended to.
    min_length: minimum length of a target in symbols.
    max_length: maximum length; None for twice the source plus 10, or more for a model whose
        training targets were longer.
    block_ngrams: never repeat an n-gram of this many symbols; 0 allows it. A target that has no
        other way to go on ends, even before min_length.
    sample: draw symbols at random instead of taking the likeliest, with beam=1.
    temperature: temperature of the draw; below 1 is sharper.
    top_k, top_p: draw from the k likeliest symbols (0 for all), or from the likeliest whose
        probabilities reach p.
    seed: seed of the draw; None for a different draw each time. The native decoder and torch draw
        different symbols from the same seed. A draw also depends on the position of the source in
        its batch.

    Raises ValueError if a value is not allowed, or if values contradict one another.
    """

    beam: int = 1
    nbest: int = 1
    nbest_mass: float | None = None
    length_penalty: str = "average"
    alpha: float = 0.6
    coverage_penalty: float = 0.0
    min_length: int = 0
    max_length: int | None = None
    block_ngrams: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            _check_positive(name, getattr(self, name))
        if self.max_length is not None:
            _check_positive("max_length", self.max_length)
        for name in ("min_length", "block_ngrams", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
            _check_size(name, value)
        if self.nbest_mass is not None:
            _check_mass(self.nbest_mass)
        _check_choice("length_penalty", self.length_penalty, LENGTH_PENALTIES)
        for name in ("alpha", "coverage_penalty"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not (_is_finite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        if not (_is_finite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if not isinstance(self.sample, bool):
            raise ValueError(f"sample must be True or False, got {self.sample!r}")
        _check_seed(self.seed)
        if self.nbest > self.beam:
            raise ValueError(f"nbest must be at most beam = {self.beam}, got {self.nbest}")
        if self.sample and self.beam > 1:
            raise ValueError(f"sample goes with beam = 1, got beam = {self.beam}")
        if self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"min_length must be at most max_length = {self.max_length}, got {self.min_length}"
            )

    @property
    def most(self) -> int:
        """The largest number of hypotheses returned for a source."""
        return self.beam if self.nbest == 1 and self.nbest_mass is not None else self.nbest


def _is_finite(value: object) -> bool:
    """Whether this is a finite number. True and False are not numbers here."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _check_seed(value: Any) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and -(2**63) <= value < 2**64):
        # The seeds that torch.manual_seed takes.
        raise ValueError(f"seed must be a whole number in -2**63..2**64-1 or None, got {value!r}")


def _check_mass(value: Any) -> None:
    if not (_is_finite(value) and 0.0 < value <= 1.0):
        raise ValueError(f"nbest_mass must be above 0 and at most 1, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        shown = choices if isinstance(value, str) else map(repr, choices)
        raise ValueError(f"{name} must be one of {', '.join(shown)}, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    _check_size(name, value)


def _check_size(name: str, value: int) -> None:
    if value > LARGEST_INT:
        raise ValueError(f"{name} must be at most {LARGEST_INT}, got a larger number")
