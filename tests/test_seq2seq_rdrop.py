"""R-Drop: the divergence of two passes of a pair with different dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fused_attn.cli import main
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Batch, Examples
from fused_attn.seq2seq.model.losses import rdrop_loss
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import PAD

SYMBOLS = 9


def pairs(count: int, seed: int = 0) -> Examples:
    """Sources of 1 to 7 symbols, reversed as targets."""
    generator = torch.Generator().manual_seed(seed)
    sources = [
        torch.randint(4, SYMBOLS, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 8, (count,), generator=generator)
    ]
    return Examples.collect([(source, source[::-1], ()) for source in sources])


def small(**options: float) -> Seq2Seq:
    torch.manual_seed(1)
    return Seq2Seq(ModelConfig(hidden=24, embedding=12, **options), SYMBOLS, SYMBOLS)


def batch_of(examples: Examples) -> Batch:
    return examples.batch(torch.arange(len(examples)))


def divergences(logits: Tensor, expected: Tensor) -> Tensor:
    """The sum of both divergences of each symbol, by torch's function in float64."""
    first, second = logits.double().log_softmax(dim=-1).chunk(2)
    added = torch.zeros((), dtype=torch.float64)
    for n, t in (expected[: len(first)] != PAD).nonzero().tolist():
        for p, q in ((first, second), (second, first)):
            added += kl_div(p[n, t], q[n, t], log_target=True, reduction="sum")
    return added


def train(model: Seq2Seq, examples: Examples, config: TrainingConfig) -> list[float]:
    """Train to the end and return the losses of the steps."""
    losses: list[float] = []
    trainer = Trainer(model, examples, config)
    while not trainer.finished:
        trainer.run_epoch(lambda report: losses.append(report.loss), lambda: False)
        trainer.finish_epoch()
    return losses


def test_it_is_the_mean_of_both_divergences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 7) * 4
    expected = torch.randint(4, 7, (3, 5)).repeat(2, 1)
    expected[1, 3:] = expected[4, 3:] = PAD
    logits[1, 3:] = 1e4  # padding, which does not count
    given = logits.clone().requires_grad_()
    found = rdrop_loss(given, expected)
    oracle = logits.double().requires_grad_()
    right = 0.5 * divergences(oracle, expected)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0.0)
    (gradient,) = torch.autograd.grad(found, given)
    (right_gradient,) = torch.autograd.grad(right, oracle)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=1e-4, atol=1e-5)
    assert gradient[:3].any() and gradient[3:].any()  # the gradient flows into both passes


def test_the_loss_is_half_of_equation_4() -> None:
    batch = batch_of(pairs(17))
    model = small(dropout=0.4)
    model.output.weight.data *= 30.0  # so that the passes differ as much as in a trained model
    torch.manual_seed(5)
    found = model.loss(
        batch.source, batch.source_lengths, batch.target, label_smoothing=0.1, rdrop=3.0
    )
    twice = [torch.cat([part, part]) for part in (batch.source, batch.source_lengths, batch.target)]
    torch.manual_seed(5)
    logits, _ = model(*twice[:2], twice[2][:, :-1])
    expected = twice[2][:, 1:]
    entropy = cross_entropy(
        logits.flatten(0, 1),
        expected.flatten(),
        ignore_index=PAD,
        label_smoothing=0.1,
        reduction="sum",
    )
    right = (entropy + 3.0 * 0.5 * divergences(logits, expected)) / 2 / batch.tokens
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0.0)
    assert divergences(logits, expected) > 1.0


def test_without_dropout_nothing_is_added() -> None:
    examples = pairs(9)
    batch = batch_of(examples)
    model = small(dropout=0.0)
    arguments = batch.source, batch.source_lengths, batch.target
    for tokens in (None, 1000):
        plain = model.loss(*arguments, tokens=tokens)
        torch.testing.assert_close(model.loss(*arguments, rdrop=5.0, tokens=tokens), plain)


def test_training_with_it_brings_the_passes_together() -> None:
    """After the same number of steps, the passes of the model trained with R-Drop differ less."""
    examples, unseen = pairs(600), batch_of(pairs(200, seed=1))
    apart = {}
    for rdrop in (0.0, 5.0):
        model = small(dropout=0.3)
        config = TrainingConfig(epochs=8, batch_size=32, lr=5e-3, rdrop=rdrop)
        losses = train(model, examples, config)
        assert losses[-1] < losses[0]
        torch.manual_seed(2)
        rows = torch.arange(200).repeat(2)
        with torch.no_grad():
            logits, _ = model(
                unseen.source[rows], unseen.source_lengths[rows], unseen.target[rows, :-1]
            )
        apart[rdrop] = float(rdrop_loss(logits, unseen.target[rows, 1:]) / unseen.tokens)
    assert apart[5.0] < 0.5 * apart[0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rdrop -1", "rdrop must be at least 0, got -1.0"),
        ("--rdrop 5 --dropout 0", "--rdrop needs a dropout above 0"),
    ],
)
def test_what_cannot_work_is_refused(
    options: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["train", "reverse", "--output", str(output), *options.split()]) == 2
    assert message in capfd.readouterr().err
    assert not output.exists()
