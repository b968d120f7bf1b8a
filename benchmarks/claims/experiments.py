"""The experiments behind the claims: small models on generated sequences."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples, pad
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import PAD

SYMBOLS = 20
FIRST = 3  # number of the first symbol, after the special ones
BUCKET = 5  # lengths that are counted together

Sequences = list[list[int]]


@dataclass(frozen=True)
class Budget:
    """What every model gets: the same for all."""

    pairs: int = 12_000
    epochs: int = 8
    longest: int = 30
    seeds: tuple[int, ...] = (1, 2, 3)
    judged: int = 600


QUICK = Budget(pairs=1_000, epochs=1, longest=12, seeds=(1, 2), judged=60)


@dataclass
class Spread:
    """A value for every seed, by place."""

    values: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def rows(self) -> list[tuple[int, float, float, float]]:
        """Place, mean, lowest and highest."""
        return [
            (place, sum(found) / len(found), min(found), max(found))
            for place, found in sorted(self.values.items())
        ]


def copies(count: int, longest: int, seed: int) -> tuple[Sequences, Sequences]:
    """Sequences of symbols, and the same as targets."""
    generator = random.Random(seed)
    found = [
        [FIRST + generator.randrange(SYMBOLS) for _ in range(generator.randint(1, longest))]
        for _ in range(count)
    ]
    return found, [list(sequence) for sequence in found]


def walks(count: int, seed: int) -> tuple[Sequences, Sequences]:
    """Targets in which every symbol follows from the one before and from the source.

    a <- 3 a + x mod 10, twice for each x: one wrong symbol makes all later ones wrong.
    """
    generator = random.Random(seed)
    sources, targets = [], []
    for _ in range(count):
        source = [generator.randrange(10) for _ in range(generator.randint(3, 6))]
        place, target = source[0], []
        for x in source:
            for _ in range(2):
                place = (3 * place + x) % 10
                target.append(FIRST + place)
        sources.append([FIRST + x for x in source])
        targets.append(target)
    return sources, targets


def train(
    shape: ModelConfig,
    pairs: tuple[Sequences, Sequences],
    recipe: TrainingConfig,
    rate: Callable[[Seq2Seq], float] | None = None,
) -> Seq2Seq:
    """Return a trained model. ``rate`` is the error that scheduled sampling may wait for."""
    torch.manual_seed(recipe.seed)
    size = FIRST + SYMBOLS
    trainer = Trainer(Seq2Seq(shape, size, size), Examples.of(*pairs), recipe)
    while not trainer.finished:
        trainer.run_epoch(lambda report: None, lambda: False)
        trainer.finish_epoch(None if rate is None else rate(trainer.model.eval()))
    return trainer.model.eval()


def shape_of(score: str, **options: Any) -> ModelConfig:
    """The model of every experiment, with the attention that ``score`` names."""
    common: dict[str, Any] = {
        "cell": "gru", "hidden": 64, "embedding": 32, "bidirectional": False, "dropout": 0.0,
    }  # fmt: skip
    return ModelConfig(**common | {"score": score} | options)


BOTTLENECK = {
    "no attention": shape_of("none"),
    "no attention, source reversed": shape_of("none", reverse_source=True),
    "dot": shape_of("dot"),
    "general": shape_of("general"),
    "concat": shape_of("concat", attn_dim=64),
}


def bottleneck(
    budget: Budget, tell: Callable[[str], None]
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Shares of correct symbols by source length, and of correct alignments."""
    right = {name: Spread() for name in BOTTLENECK}
    aligned = {name: Spread() for name, shape in BOTTLENECK.items() if shape.score != "none"}
    for seed in budget.seeds:
        pairs = copies(budget.pairs, budget.longest, seed)
        for name, shape in BOTTLENECK.items():
            recipe = TrainingConfig(epochs=budget.epochs, batch_size=64, lr=4e-3, seed=seed)
            model = train(shape, pairs, recipe)
            fresh = copies(budget.judged, budget.longest, 1000 + seed)
            shares = judge(model, fresh)
            for place, share in shares.items():
                right[name].values[place].append(share)
            if name in aligned:
                aligned[name].values[0].append(aligned_share(model, fresh))
            tell(f"seed {seed}, {name}: {sum(shares.values()) / len(shares):.3f} right")
    return right, aligned


def judge(model: Seq2Seq, pairs: tuple[Sequences, Sequences]) -> dict[int, float]:
    """Share of correct symbols by source length, when the model decodes freely.

    A bucket is named by its longest length. Symbols are compared position by position.
    """
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for sources, targets in _batches(*pairs):
        found = search(model, *pad(sources))
        for (hypothesis,), target in zip(found, targets, strict=True):
            bucket = -(-len(target) // BUCKET) * BUCKET
            same = sum(a == b for a, b in zip(hypothesis.tokens, target, strict=False))
            counts[bucket][0] += same
            counts[bucket][1] += max(len(target), len(hypothesis.tokens))
    return {bucket: same / total for bucket, (same, total) in sorted(counts.items())}


@torch.no_grad()
def aligned_share(model: Seq2Seq, pairs: tuple[Sequences, Sequences]) -> float:
    """Share of the symbols of a copy whose largest weight lies on the symbol itself.

    The decoder is fed the correct symbols: before it writes symbol t it has read symbol t - 1.
    """
    right = total = 0
    for sources, targets in _batches(*pairs):
        batch = Examples.of(sources, targets).batch(torch.arange(len(sources)))
        _, weights = model(
            batch.source, batch.source_lengths, batch.target[:, :-1], return_weights=True
        )
        places = weights.argmax(dim=-1)
        steps = torch.arange(places.shape[1])
        inside = steps < batch.source_lengths[:, None]  # not EOS
        right += int(((places == steps) & inside).sum())
        total += int(inside.sum())
    return right / total


def _batches(sources: Sequences, targets: Sequences) -> Iterator[tuple[Sequences, Sequences]]:
    for start in range(0, len(sources), 200):
        yield sources[start : start + 200], targets[start : start + 200]


def gradient_norms(model: Seq2Seq, lengths: Sequence[int]) -> dict[int, float]:
    """Norm, by source length, of the gradient of a copy's first target symbol with respect to the
    embedding of its first source symbol.

    The recurrence carries it over the whole source and back; attention carries it directly.
    """
    found: dict[int, float] = {}
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        source = torch.randint(FIRST, FIRST + SYMBOLS, (64, length), generator=generator)
        embedded: list[Tensor] = []
        hook = model.source_embedding.register_forward_hook(
            lambda module, inputs, output, kept=embedded: kept.append(output)
        )
        inputs = torch.ones(64, 1, dtype=torch.long)  # BOS
        logits, _ = model(source, torch.full((64,), length), inputs)
        hook.remove()
        losses = torch.nn.functional.cross_entropy(logits[:, 0], source[:, 0], reduction="sum")
        (gradient,) = torch.autograd.grad(losses, embedded[0])
        found[length] = gradient[:, 0].norm(dim=-1).mean().item()
    return found


def vanishing(budget: Budget, tell: Callable[[str], None]) -> dict[str, Spread]:
    """`gradient_norms` of untrained models: what training starts from."""
    found = {name: Spread() for name in BOTTLENECK}
    for name, shape in BOTTLENECK.items():
        for seed in budget.seeds:
            torch.manual_seed(seed)
            model = Seq2Seq(shape, FIRST + SYMBOLS, FIRST + SYMBOLS)
            for length, norm in gradient_norms(model, (2, 5, 10, 20, 40, 80)).items():
                found[name].values[length].append(norm)
    tell("gradients at the first source symbol")
    return found


HYBRIDS: dict[str, dict[str, Any]] = {
    "none: teacher forcing": {},
    "linear to 0.25, once half are right": {
        "sampling": "linear", "sampling_max": 0.25, "sampling_after": 0.5,
    },
    "linear to 0.7, from the start": {"sampling": "linear", "sampling_max": 0.7},
}  # fmt: skip


def exposure(budget: Budget, tell: Callable[[str], None]) -> dict[str, dict[str, Spread]]:
    """Shares of correct symbols when fed correct ones and when fed its own, and their gap."""
    found: dict[str, dict[str, Spread]] = {}
    fresh = Examples.of(*walks(budget.judged, seed=2))
    shape = ModelConfig(cell="gru", hidden=48, embedding=16, dropout=0.1)
    for title, options in HYBRIDS.items():
        spreads = found[title] = {name: Spread() for name in ("right ones", "its own", "gap")}
        for seed in budget.seeds:
            epochs = 2 * budget.epochs + 4
            recipe = TrainingConfig(epochs=epochs, batch_size=64, lr=5e-3, seed=seed, **options)
            pairs = walks(budget.pairs // 3, seed=1)
            model = train(shape, pairs, recipe, lambda model: 1 - _accuracies(model, fresh)[1])
            right, own = _accuracies(model, fresh)
            for spread, value in zip(spreads.values(), (right, own, right - own), strict=True):
                spread.values[0].append(value)
        tell(f"scheduled sampling {title}")
    return found


@torch.no_grad()
def _accuracies(model: Seq2Seq, examples: Examples) -> tuple[float, float]:
    batch = examples.batch(torch.arange(len(examples)))
    inputs, expected = batch.target[:, :-1], batch.target[:, 1:]
    counts, found = expected != PAD, []
    for sampling in (0.0, 1.0):
        logits, _ = model(batch.source, batch.source_lengths, inputs, sampling=sampling)
        right = (logits.argmax(dim=-1) == expected) & counts
        found.append((right.sum() / counts.sum()).item())
    return found[0], found[1]
