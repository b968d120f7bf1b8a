"""Train a model from Python in one call, and the parts that the command ``train`` shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints, find_checkpoint, last_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import Recipe, load_recipe
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.predictor import Predictor, load
from fused_attn.seq2seq.option_rules import TRAINING_NEEDS, settle
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.tasks.text import Pairs
from fused_attn.seq2seq.training.processes import gathered, launch, leave, total
from fused_attn.seq2seq.training.progress import NoProgress, Progress, make_progress
from fused_attn.seq2seq.training.run import Run
from fused_attn.seq2seq.training.signals import stop_signals
from fused_attn.seq2seq.training.start import Machine, resume_run, start_run

# Options of `fit` that go to the configuration of the task.
DATA_OPTIONS = ("min_count", "max_length", "skip_bad", "vocabulary")
# Pairs in memory, or a file of them.
Source = str | Path | Iterable[tuple[str | Sequence[str], str | Sequence[str]]]


@dataclass(frozen=True)
class Outcome:
    """The result of `carry_out`.

    stopped: whether a signal stopped the run. was_complete: whether no steps were left to train.
    """

    run: Run
    stopped: bool = False
    was_complete: bool = False


def carry_out(directory: Path, make_run: Callable[[], Run]) -> Outcome:
    """Train a run to its end, or until SIGINT or SIGTERM, which write a checkpoint and stop it.

    directory: of the run. make_run: starts or resumes the run.

    Raises `InputError` if the run cannot be started or written.
    """
    with stop_signals() as received:
        try:
            run = make_run()
            if run.trainer.finished:
                return Outcome(run, was_complete=True)
            fabric = run.trainer.fabric
            stopped = not run.train(lambda: _any(fabric, received()))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename or directory}: {error.strerror}; "
                "earlier checkpoints are intact"
            ) from None
    if not stopped:
        fabric.barrier()  # until process 0 has written the last checkpoint
    return Outcome(run, stopped)


def _any(fabric: Fabric, value: bool) -> bool:
    """Whether ``value`` is true in any process: all must stop at the same step."""
    if fabric.world_size == 1:
        return value
    return total(fabric, torch.tensor(float(value), device=fabric.device)).item() > 0


def is_new(directory: Path) -> bool:
    """Whether a run may start in a directory: it does not exist, or is empty."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def fit(
    pairs: Source,
    *,
    output: str | Path,
    dev: Source | None = None,
    tokens: str | tuple[str, str] | None = None,
    task: str = "pairs",
    model: ModelConfig | None = None,
    training: TrainingConfig | None = None,
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
            holds out 2 % of ``pairs``.
        tokens: how to split texts: "words", "chars" or "subwords", or a tuple of two of these for
            sources and targets; None takes the default of the task.
        task: "pairs" (words by default), or "translate" for sentences (subwords, larger model,
            BLEU).
        model, training: shape of the model and training options; None takes those of the task, and
            the shape of ``start_from`` if that is given.
        start_from: a model to start from, with its parameters and vocabularies.
        teachers: models whose probabilities are learned besides the targets (distillation).
        resume: resume the run in ``output``. Give the same pairs; model, training, tokens and data
            options are those of the run.
        backend: backend of the attention, "auto" or a name.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        progress: show a progress bar on a terminal, lines elsewhere, and notes about the data.
        tensorboard: also write events for TensorBoard.
        on_disk: keep the encoded pairs in files in ``output``, for data larger than memory.
        data: other data options: ``min_count``, ``max_length``, ``skip_bad`` and, for subwords,
            ``vocabulary``; see `fused_attn.seq2seq.tasks.text.TextConfig`.

    SIGINT (Ctrl-C, or the stop button of a notebook) writes a checkpoint and raises
    KeyboardInterrupt. The state of torch's random generators is restored at the end.

    Raises `InputError` if a pair, an option or the directory cannot be used, or if training fails;
    earlier checkpoints are intact then.
    """
    directory = _checked_output(output)
    for name, value, kind in (
        ("model", model, ModelConfig),
        ("training", training, TrainingConfig),
    ):
        if value is not None and not isinstance(value, kind):
            raise OptionError(name, f"must be a {kind.__name__}, got {type(value).__name__}")
    teachers = [teachers] if isinstance(teachers, (str, Path)) else list(teachers)
    chosen = _data_options(data) | _tokens(tokens)
    if not isinstance(task, str) or not issubclass(TASKS.get(task, object), Pairs):
        names = " or ".join(name for name, kind in TASKS.items() if issubclass(kind, Pairs))
        raise OptionError("task", f"must be {names}, got {task!r}")
    given = {"train": pairs} if dev is None else {"train": pairs, "dev": dev}
    in_python = {name: _listed(name, each) for name, each in given.items() if _is_given(each)}
    shown = make_progress() if progress else NoProgress()
    initialized = dist.is_initialized()

    def make_run() -> Run:
        if resume:
            asked = (model, training, chosen)
            return _resumed(directory, in_python, asked, shown, _machine)
        if not is_new(directory):
            raise InputError(_not_new(directory))
        files_ = {name: str(each) for name, each in given.items() if name not in in_python}
        recipe = _recipe(task, model, training, start_from, chosen | files_, in_python)
        machine = _machine(recipe)
        gathered(machine.fabric, None)  # all check the directory before one of them writes there
        note = _note if progress and machine.fabric.is_global_zero else _ignore
        return start_run(directory, recipe, shown, machine, note, start_from, teachers)

    def _machine(recipe: Recipe) -> Machine:
        return Machine(
            launch(str(device), recipe.training.precision), backend, on_disk, tensorboard
        )

    with torch.random.fork_rng():
        outcome = carry_out(directory, make_run)
        found = outcome.run.trainer.fabric.device
    if not initialized:
        leave()
    if outcome.stopped:
        raise KeyboardInterrupt(
            f"stopped; fit(..., output={str(directory)!r}, resume=True) resumes the run"
        )
    return load(directory, backend=backend, device=found)


def _resumed(
    directory: Path,
    in_python: dict[str, list[Any]],
    asked: tuple[ModelConfig | None, TrainingConfig | None, dict[str, Any]],
    progress: Progress,
    machine: Callable[[Recipe], Machine],
) -> Run:
    last = last_checkpoint(directory)
    recipe = load_recipe(last, files.load_metadata(last))
    if not isinstance(recipe.task, Pairs):
        raise InputError(
            f"the run in {directory} has the task {recipe.task.name}; resume it with "
            f"fused-attn train {recipe.task.name} --output {directory} --resume"
        )
    model, training, chosen = asked
    for name, differs in (
        ("model", model is not None and model != recipe.model),
        ("training", training is not None and training != recipe.training),
        *(
            (
                "tokens" if name.endswith("tokens") else name,
                getattr(recipe.task.config, name) != value,
            )
            for name, value in chosen.items()
        ),
    ):
        if differs:
            raise OptionError(
                name,
                f"is not that of the run in {directory}; leave it out to resume, or start another "
                "run, with start_from to begin with this model",
            )
    return resume_run(directory, progress, machine(recipe), in_python)


def _checked_output(output: Any) -> Path:
    if not isinstance(output, (str, Path)) or not str(output):
        raise OptionError("output", f"must be the path of a directory, got {output!r}")
    return Path(output)


def _not_new(directory: Path) -> str:
    if not directory.is_dir():
        return f"output must be a directory, and {directory} is a file"
    resume = "; to resume the run in it, pass resume=True" if checkpoints(directory) else ""
    return f"{directory} is not an empty directory{resume}"


def _data_options(options: dict[str, Any]) -> dict[str, Any]:
    for name in options.keys() - set(DATA_OPTIONS):
        elsewhere = {field.name: "training" for field in fields(TrainingConfig)} | {
            field.name: "model" for field in fields(ModelConfig)
        }
        hint = f"options of data are {', '.join(DATA_OPTIONS)}"
        if name in elsewhere:
            kind = {"training": "TrainingConfig", "model": "ModelConfig"}[elsewhere[name]]
            hint = f"it belongs in {elsewhere[name]}={kind}({name}=...)"
        raise TypeError(f"unknown option {name!r}: {hint}")
    return dict(options)


def _recipe(
    task: str,
    model: ModelConfig | None,
    training: TrainingConfig | None,
    start_from: str | Path | None,
    chosen: dict[str, Any],
    in_python: dict[str, list[Any]],
) -> Recipe:
    kind = TASKS[task]
    shape, values = kind.model, {}
    if start_from is not None:
        origin = find_checkpoint(start_from)
        before = load_recipe(origin, files.load_metadata(origin))
        if before.task.name != task:
            raise OptionError(
                "start_from", f": {origin} has the task {before.task.name}, expected {task}"
            )
        shape = before.model
        values = asdict(before.task.config) | dict.fromkeys(("train", "dev", "test"))
    defaults = {f.name: getattr(kind.kind, f.name) for f in fields(kind.kind)} | values
    rest = {**asdict(model or shape), **asdict(training or kind.training)}
    rest |= {"start_from": start_from, "teacher": [], "backend": "auto"}
    settle(TRAINING_NEEDS, rest | defaults, chosen)
    try:
        config = kind.kind(**values | chosen)
    except ValueError as error:
        name, _, reason = str(error).partition(" ")
        raise OptionError(name, reason) from None
    assert issubclass(kind, Pairs)
    return Recipe(model or shape, training or kind.training, kind(config, in_python))


def _is_given(pairs: Any) -> bool:
    return not isinstance(pairs, (str, Path))


def _listed(name: str, pairs: Any) -> list[Any]:
    try:
        return list(pairs)
    except TypeError:
        what = f"must be an iterable of pairs or the path of a file, got {type(pairs).__name__}"
        raise OptionError("pairs" if name == "train" else name, what) from None


def _tokens(tokens: str | tuple[str, str] | None) -> dict[str, str | None]:
    if tokens is None:
        return {}
    if isinstance(tokens, str):
        return {"tokens": tokens, "source_tokens": None, "target_tokens": None}
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2:
        raise OptionError("tokens", f"must be a name or two, got {tokens!r}")
    source, target = tokens
    return {"source_tokens": source, "target_tokens": target}


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _ignore(_: str) -> None:
    return None
