"""Train the toolkit's model with your own training loop in plain PyTorch.

The task: spell a number from 0 to 999, given by its digits, in English words ("705" -> "seven
hundred five"). The data set, the batches, the optimizer and the loop are yours; the model and the
prediction come from fused_attn. Training takes about ten seconds on one core:

    python examples/own_training_loop.py runs/numbers
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from fused_attn.seq2seq import BOS, EOS, PAD, ModelConfig, Predictor, Seq2Seq, Vocabulary, evaluate

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(number: int) -> list[str]:
    """Return the words of a number below 1,000."""
    if number < 20:
        return [UNITS[number]]
    if number < 100:
        return [TENS[number // 10], *([UNITS[number % 10]] if number % 10 else [])]
    return [UNITS[number // 100], "hundred", *(spell(number % 100) if number % 100 else [])]


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of digits and words, as int64 tensors of symbol ids."""

    def __init__(self, numbers: list[int], source: Vocabulary, target: Vocabulary) -> None:
        self.pairs = [
            (
                torch.tensor(source.encode(str(n))),
                torch.tensor([BOS, *target.encode(spell(n)), EOS]),
            )
            for n in numbers
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index]


def collate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return sources (B, S), their lengths (B,) and targets (B, T + 1), padded at the end."""
    sources, targets = zip(*pairs, strict=True)
    lengths = torch.tensor([len(source) for source in sources])
    padded = (pad_sequence(list(each), True, PAD) for each in (sources, targets))
    source, target = padded
    return source, lengths, target


def train(epochs: int = 10) -> tuple[Predictor, list[int]]:
    """Return a trained model and the held-out numbers."""
    torch.manual_seed(0)
    numbers = torch.randperm(1000).tolist()
    held_out, seen = numbers[:100], numbers[100:]
    source = Vocabulary("0123456789")
    target = Vocabulary(sorted({word for number in range(1000) for word in spell(number)}))
    loader = DataLoader(Numbers(seen, source, target), 32, shuffle=True, collate_fn=collate)

    config = ModelConfig(hidden=64, embedding=32, score="general", dropout=0.1)
    model = Seq2Seq(config, len(source), len(target))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(*batch)  # mean cross-entropy per target symbol, in nats
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")
    return Predictor(model, source, target), held_out


def main() -> None:
    predictor, held_out = train()
    # Sources are tuples of digits. As a text, "705" would be a single word.
    pairs = [(tuple(str(number)), spell(number)) for number in held_out]
    measures = evaluate(predictor, pairs)
    print({name: f"{100 * value:.1f} %" for name, value in measures.items()})
    print(predictor([tuple("705"), tuple("42")]))
    if len(sys.argv) > 1:
        predictor.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
