"""How options depend on one another. An option that is given is never silently ignored.

The configurations cannot decide this: they hold every field, given or not, and have to accept what
is in the checkpoints of earlier versions. They refuse only values that no model can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fused_attn.choices import SCORES
from fused_attn.seq2seq.errors import OptionError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Needs:
    """An option that has an effect only with certain values of others.

    option: dest of the option.
    why: what the error says after the option's name.
    holds: whether the option has an effect, from the values of all options.
    others: dests of the options that ``holds`` depends on.
    off: the value of the option that asks for nothing, and so is never refused.
    """

    option: str
    why: str
    holds: Callable[[Values], bool]
    others: tuple[str, ...]
    off: Any = None


@dataclass(frozen=True)
class Replaces:
    """Two options that decide the same thing: the one that is given replaces the other's default.

    option: dest of the option that is given.
    other, value: dest of the other option, and the value that it gets.
    when: for which values of ``option``.
    """

    option: str
    other: str
    value: Any
    when: Callable[[Any], bool] = lambda value: True


REPLACES = (
    Replaces("batch_size", "batch_tokens", None),
    Replaces("batch_tokens", "bucket", True),
    Replaces("corpus", "dialogs", None),
    # These are options of the concat score: another score drops a task's defaults for them.
    Replaces("score", "attn_dim", None, lambda score: score != "concat"),
    Replaces("score", "coverage", False, lambda score: score != "concat"),
)


def _has_attention(values: Values) -> bool:
    return bool(values["score"] != "none")


def _adds_residuals(values: Values) -> bool:
    """Whether a layer of the encoder or the decoder is as wide as its input."""
    hidden, embedding = values["hidden"], values["embedding"]
    encoder = (values["encoder_hidden"] or hidden) * (2 if values["bidirectional"] else 1)
    depth = max(values["layers"], values["encoder_layers"] or 0)
    fed = embedding + (hidden if values["input_feeding"] else 0)
    return bool(depth > 1 or embedding == encoder or fed == hidden)


def _samples(values: Values) -> bool:
    return bool(values["sampling"] != "none")


def _tokens(values: Values) -> tuple[str, str]:
    """What the symbols of sources and of targets are."""
    source, target = values.get("source_tokens"), values.get("target_tokens")
    return source or values["tokens"], target or values["tokens"]


_TOKENS = ("tokens", "source_tokens", "target_tokens")
_NO_SAMPLING = "has no effect without --sampling"
TRAINING_NEEDS = (
    Needs("window", "has no effect without --local", lambda v: v["local"], ("local",)),
    Needs(
        "max_source",
        "has no effect without --score location",
        lambda v: v["score"] == "location",
        ("score",),
    ),
    Needs(
        "residual",
        "has no effect without --layers above 1: no layer is as wide as its input",
        _adds_residuals,
        (
            *("layers", "encoder_layers", "hidden", "encoder_hidden", "embedding"),
            *("bidirectional", "input_feeding"),
        ),
        off=False,
    ),
    Needs(
        "variational",
        "has no effect without --dropout above 0",
        lambda v: v["dropout"] > 0,
        ("dropout",),
        off=False,
    ),
    Needs(
        "bucket",
        "needs --batch-size: --batch-tokens fills its batches with pairs of similar length",
        lambda v: v["bucket"] or v["batch_tokens"] is None,
        ("batch_size", "batch_tokens"),
        off=True,
    ),
    Needs("coverage_loss", "needs a --score other than none", _has_attention, ("score",), off=0.0),
    Needs("guided", "needs a --score other than none", _has_attention, ("score",), off=0.0),
    Needs("teacher_weight", "needs a --teacher", lambda v: v["teacher"], ("teacher",)),
    Needs(
        "label_smoothing",
        "has no effect with --teacher-weight 1, which leaves only the loss of the teachers",
        lambda v: not v["teacher"] or v["teacher_weight"] < 1,
        ("teacher", "teacher_weight"),
        off=0.0,
    ),
    *(
        Needs(option, _NO_SAMPLING, _samples, ("sampling",))
        for option in ("sampling_max", "sampling_per", "sampling_after")
    ),
    Needs(
        "tokens",
        "has no effect with --source-tokens and --target-tokens",
        lambda v: not (v.get("source_tokens") and v.get("target_tokens")),
        ("source_tokens", "target_tokens"),
    ),
    Needs(
        "vocabulary",
        "has no effect without --tokens subwords",
        lambda v: "subwords" in _tokens(v),
        _TOKENS,
    ),
    Needs(
        "vocabulary",
        "has no effect with --start-from, which keeps the subwords of that model",
        lambda v: v["start_from"] is None or v["subwords"] is None,
        ("start_from",),
    ),
    Needs(
        "min_count",
        "has no effect with --tokens subwords",
        lambda v: set(_tokens(v)) != {"subwords"},
        _TOKENS,
        off=1,
    ),
    Needs(
        "backend",
        "has no effect without a --score of dot, general or concat",
        lambda v: v["score"] in SCORES,
        ("score",),
        off="auto",
    ),
)


def _draws(values: Values) -> bool:
    return bool(values["sample"])


def _ranks(values: Values) -> bool:
    """Whether the score of a target is used: to rank those of a beam, or because it is shown."""
    return bool(values["beam"] > 1 or values["shows_scores"])


_BEST_ONLY = "has no effect here: this command takes the best target of each source"
SEARCH_NEEDS = (
    *(
        Needs(option, "has no effect without --sample", _draws, ("sample",), off)
        for option, off in (("temperature", None), ("top_k", 0), ("top_p", 1.0), ("seed", None))
    ),
    Needs(
        "alpha",
        "has no effect without --length-penalty gnmt",
        lambda v: v["length_penalty"] == "gnmt",
        ("length_penalty",),
    ),
    Needs("nbest_mass", _BEST_ONLY, lambda v: v["returns_several"], ()),
    Needs("nbest_mass", "needs --beam above 1", lambda v: v["beam"] > 1, ("beam",)),
    *(
        Needs(option, "has no effect without --beam above 1", _ranks, ("beam",), off)
        for option, off in (("length_penalty", None), ("coverage_penalty", 0.0))
    ),
    Needs("nbest", _BEST_ONLY, lambda v: v["returns_several"], (), off=1),
    Needs(
        "nbest",
        "needs --beam: without it this command chooses a beam and shows all of it",
        lambda v: not v["own_beam"],
        ("beam",),
    ),
)

# What `predict` writes.
OUTPUT_NEEDS = (
    Needs(
        "scores",
        "goes with --format text: the other formats have log probabilities",
        lambda v: v["format"] == "text",
        ("format",),
        off=False,
    ),
    Needs(
        "with_alignment",
        "needs --format tsv or json (--alignments writes a file of alignments)",
        lambda v: v["format"] != "text",
        ("format",),
        off=False,
    ),
)


def merged(file: Values, line: Values) -> dict[str, Any]:
    """Return the options of a configuration file and of the command line, which overrides it."""
    dropped = {rule.other for rule in _active(line) if rule.other not in line}
    found = {name: value for name, value in file.items() if name not in dropped}
    for name, value in line.items():
        # Options that may be repeated add up.
        both = isinstance(value, list) and name in found
        found[name] = [*found[name], *value] if both else value
    return found


def settle(
    needs: tuple[Needs, ...], defaults: Values, line: Values, file: Values | None = None
) -> dict[str, Any]:
    """Return the options to apply: those that are given, and the values that they replace.

    needs: the rules of the command.
    defaults: values of the options that are not given, for all that ``needs`` depend on.
    line, file: the options on the command line and in a configuration file.

    Raises `InputError` if two options of one place contradict each other, or if an option has no
    effect. An option of the file may lose its effect to an option of the command line.
    """
    file = file or {}
    for given in (file, line):
        _refuse_contradictions(given)
    found = merged(file, line)
    found = {rule.other: rule.value for rule in _active(found) if rule.other not in found} | found
    values = {**defaults, **found}
    for rule in needs:
        if rule.option not in found or found[rule.option] == rule.off or rule.holds(values):
            continue
        if rule.option in line or not any(other in line for other in rule.others):
            typed = spelled(rule.option, found[rule.option])
            raise OptionError(rule.option, rule.why, typed)
    return found


def _active(given: Values) -> list[Replaces]:
    return [rule for rule in REPLACES if rule.option in given and rule.when(given[rule.option])]


def _refuse_contradictions(given: Values) -> None:
    for rule in _active(given):
        if given.get(rule.other, rule.value) != rule.value:
            both = (rule.option, rule.other)
            first, second = (spelled(name, given[name], with_value=True) for name in both)
            raise OptionError(
                rule.option, f"and {second} contradict each other: leave one out", first
            )


def spelled(option: str, value: object, with_value: bool = False) -> str:
    """Return the option as it is typed: ``--batch-size``, ``--no-bucket``, ``--score dot``."""
    name = option.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}" if with_value else f"--{name}"
