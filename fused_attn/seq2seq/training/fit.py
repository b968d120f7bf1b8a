"""Training from Python: from pairs to a model in one call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_attn.seq2seq.checkpoints.recipe import Recipe
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError, named_in_python
from fused_attn.seq2seq.inference.predictor import Predictor, load
from fused_attn.seq2seq.training import arguments
from fused_attn.seq2seq.training.arguments import is_path
from fused_attn.seq2seq.training.directory import is_new
from fused_attn.seq2seq.training.prepare import Machine
from fused_attn.seq2seq.training.processes import gathered, launch, leave
from fused_attn.seq2seq.training.progress import NoProgress, make_progress
from fused_attn.seq2seq.training.resume import resume_run
from fused_attn.seq2seq.training.run import Run, carry_out
from fused_attn.seq2seq.training.start import start_run

# Pairs in memory, or a file of them.
Source = str | Path | Iterable[tuple[str | Sequence[str], str | Sequence[str]]]


def fit(
    pairs: Source,
    *,
    output: str | Path,
    dev: Source | None = None,
    tokens: str | tuple[str, str] | None = None,
    task: str | None = None,
    model: ModelConfig | Mapping[str, Any] | None = None,
    training: TrainingConfig | Mapping[str, Any] | None = None,
    start_from: str | Path | None = None,
    teachers: Sequence[str | Path] = (),
    resume: bool = False,
    backend: str = "auto",
    device: torch.device | str = "auto",
    progress: bool = True,
    tensorboard: bool = False,
    on_disk: bool = False,
    **data: Any,
) -> Predictor:
    """Train a model on pairs and return its best checkpoint as a `Predictor`.

    Args:
        pairs: (source, target) tuples, each side a text or a sequence of tokens; or the path of a
            file with lines SOURCE TAB TARGET.
        output: a new directory for checkpoints and logs, which `load` and ``fused-attn`` can read.
        dev: development set, which chooses the best checkpoint, in the form of ``pairs``; None
            holds out 2 % of ``pairs``, or none of them if they are few; a note says so.
        tokens: how to split texts: "words", "chars" or "subwords", or a tuple of two of these for
            sources and targets; None takes the default of the task.
        task: "pairs" (words by default), or "translate" for sentences (subwords, larger model,
            BLEU); "pairs" if None.
        model, training: shape of the model and training options. A mapping, such as
            ``{"epochs": 20}``, sets some fields; the others are those of the task, or the shape of
            ``start_from``. Fields that nobody sets (embedding, epochs, batch size) follow the data;
            see `fused_attn.seq2seq.tasks.defaults`.
        start_from: a model to start from, with its parameters and vocabularies.
        teachers: models whose probabilities are learned besides the targets (distillation).
        resume: resume the run in ``output``. Give the same pairs and dev; a file may have moved.
            ``training`` may differ from the run, except for its seed: ``{"epochs": 40}`` trains
            longer. So may the dropout of ``model``. Everything else is that of the run, and an
            argument that differs from it is refused.
        backend: backend of the attention, "auto" or a name.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        progress: show a progress bar on a terminal, lines elsewhere, and notes about the data.
        tensorboard: also write events for TensorBoard.
        on_disk: keep the encoded pairs in files in ``output``, for data larger than memory.
        data: other data options: ``min_count``, ``max_length``, ``skip_bad`` and, for subwords,
            ``vocabulary``; see `fused_attn.seq2seq.tasks.text.TextConfig`.

    SIGINT (Ctrl-C, or the stop button of a notebook) writes a checkpoint and raises
    KeyboardInterrupt. The state of torch's random generators is restored at the end. The same
    arguments train the same parameters to the bit, as long as no other thread draws random numbers
    from torch meanwhile.

    Raises `InputError` if a pair, an option or the directory cannot be used, or if training fails;
    earlier checkpoints are intact then. Raises TypeError for an unknown data option.
    """
    directory = arguments.directory(output)
    arguments.given_fields("model", model, ModelConfig)
    arguments.given_fields("training", training, TrainingConfig)
    teachers = [teachers] if isinstance(teachers, (str, Path)) else list(teachers)
    kind = arguments.kind_of_task(task)
    chosen = arguments.data_options(data) | arguments.tokens(tokens)
    given = {"train": pairs} if dev is None else {"train": pairs, "dev": dev}
    in_python = {n: arguments.listed(n, p) for n, p in given.items() if not is_path(p)}
    paths = {name: str(each) for name, each in given.items() if is_path(each)}
    shown = make_progress() if progress else NoProgress()
    initialized = dist.is_initialized()

    def make_run() -> Run:
        if resume:
            asked: dict[str, Any] = {"task": task, "model": model, "training": training}
            asked |= {"start_from": start_from, "teachers": teachers or None}
            recipe, changes = arguments.recipe_to_resume(
                directory, asked, chosen | paths, in_python
            )
            machine = machine_of(recipe)
            note = note_of(machine)
            if changes:
                note(f"resuming with {', '.join(changes)}")
            return resume_run(directory, shown, machine, in_python, recipe, note)
        if not is_new(directory):
            raise InputError(arguments.why_not_new(directory))
        recipe, free = arguments.recipe(
            kind, model, training, start_from, teachers, chosen | paths, in_python
        )
        machine = machine_of(recipe)
        gathered(machine.fabric, None)  # all check the directory before one of them writes there
        return start_run(
            directory, recipe, shown, machine, note_of(machine), start_from, teachers, free
        )

    def machine_of(recipe: Recipe) -> Machine:
        fabric = launch(str(device), recipe.training.precision)
        return Machine(fabric, backend, on_disk, tensorboard)

    def note_of(machine: Machine) -> Callable[[str], None]:
        return _note if progress and machine.fabric.is_global_zero else _ignore

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        outcome = carry_out(directory, make_run, resume=resume)
        found = outcome.run.trainer.fabric.device
    if not initialized:
        leave()
    if outcome.stopped:
        raise KeyboardInterrupt(
            f"stopped; fit(..., output={str(directory)!r}, resume=True) resumes the run"
        )
    return load(directory, backend=backend, device=found)


def _note(text: str) -> None:
    print(f"note: {named_in_python(text)}", file=sys.stderr)


def _ignore(_: str) -> None:
    return None
