"""The commands of ``fused-attn`` with their arguments and options.

This module does not import torch, so that help and error messages appear at once.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_attn.choices import COMPUTE
from fused_attn.seq2seq.commands import option_help as texts
from fused_attn.seq2seq.commands.parser import (
    Command,
    CommandParser,
    Options,
    ShowHelp,
    add_machine,
    shown_default,
)
from fused_attn.seq2seq.commands.train_arguments import TRAIN
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.option_rules import OUTPUT_NEEDS, SEARCH_NEEDS, settle

_MODEL = (
    "a checkpoint, the output DIR of a training run (its best checkpoint, or its last), or a "
    "bundled model: g2p"
)
# The default beam of `explain`, which shows several alternatives.
_BEAM_OF_EXPLAIN = 5


def _as_given(_: CommandParser, given: dict[str, Any]) -> dict[str, Any]:
    """Return the given options unchanged, for commands whose options are independent."""
    return given


def _add_predict(options: Options) -> None:
    options.argument("model", type=Path, metavar="MODEL", help=_MODEL)
    options.argument(
        "text",
        nargs="*",
        metavar="TEXT",
        default=[],
        help="source texts (default: the lines of standard input)",
    )
    options.option(
        "input",
        type=Path,
        metavar="FILE",
        help="read the sources from this file; with --output, the processes of torchrun share its "
        "lines",
    )
    options.option(
        "output",
        type=Path,
        metavar="FILE",
        help="write the targets to this file, which is created only once complete",
    )
    options.option(
        "alignments",
        type=Path,
        metavar="FILE",
        help="write the alignments to this file: a picture (.png, .svg), links (.pharaoh) or all "
        "weights (.soft)",
    )
    options.option(
        "replace-unknown",
        action="store_true",
        default=False,
        help="replace an unknown target symbol by the source symbol that it is aligned to",
    )
    options.option(
        "scores",
        action="store_true",
        default=False,
        help="print the score before each target, separated by a tab",
    )
    options.option(
        "format",
        choices=["text", "tsv", "json"],
        default="text",
        metavar="FORMAT",
        help="text, or for programs tsv or json (default: text)",
    )
    options.option(
        "with-alignment",
        action="store_true",
        default=False,
        help="add the alignment to tsv (as links) or json (as weights)",
    )
    options.option(
        "strict",
        action="store_true",
        default=False,
        help="stop at the first source that is blank or cannot be read",
    )
    _add_search(options)


def _add_evaluate(options: Options) -> None:
    options.argument("model", type=Path, metavar="MODEL", help=_MODEL)
    options.option(
        "test",
        type=Path,
        metavar="FILE",
        help="evaluate on this file (default: the held-out test set)",
    )
    options.option(
        "limit", type=int, metavar="N", help="evaluate only N sources, the same ones in every run"
    )
    options.option(
        "samples",
        type=int,
        default=0,
        metavar="N",
        help="also print N sources with the model's targets and the references",
    )
    options.option("json", action="store_true", default=False, help="print JSON instead of a table")
    _add_search(options)


def _add_explain(options: Options) -> None:
    options.argument("model", type=Path, metavar="MODEL", help=_MODEL)
    options.argument("text", metavar="TEXT", help="the source text")
    options.option(
        "output", type=Path, required=True, metavar="PAGE.html", help="the HTML page to write"
    )
    _add_search(options)


def _add_chat(options: Options) -> None:
    options.argument("model", type=Path, metavar="MODEL", help=_MODEL)
    _add_search(options)


def _add_search(options: Options) -> None:
    options.section("search")
    name = options.parser.get_default("command").name
    for field, text in texts.SEARCH_HELP.items():
        default = getattr(SearchConfig, field)
        if name == "explain" and field in ("beam", "nbest"):
            default = _BEAM_OF_EXPLAIN
        options.field(SearchConfig, field, text, shown_default({default}))
    options.option(
        "ensemble",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="average the probabilities with those of this model; can be repeated",
    )
    add_machine(options)
    options.option(
        "compute",
        choices=("auto", *COMPUTE),
        default="auto",
        metavar="TYPE",
        help=f"type of the products on a CPU: {', '.join(COMPUTE)} (default: int8 for a model "
        "stored in int8, else float32)",
    )
    options.section("help")
    options.help(ShowHelp, has_more=True)


def _finish_search(parser: CommandParser, given: dict[str, Any]) -> dict[str, Any]:
    """Check the search options."""
    name = parser.get_default("command").name
    own_beam = name == "explain" and "beam" not in given and not given.get("sample")
    defaults = {
        **asdict(SearchConfig()),
        "format": "text",
        **({"beam": _BEAM_OF_EXPLAIN} if own_beam else {}),
        "own_beam": own_beam,
        "shows_scores": name == "explain" or given.get("scores", False),
        "returns_several": name in ("predict", "explain"),
    }
    settle((*SEARCH_NEEDS, *OUTPUT_NEEDS), defaults, given)
    return given


# --- commands without a search


def _add_info(options: Options) -> None:
    options.help(ShowHelp, has_more=False)


def _add_aer(options: Options) -> None:
    form = "links in Pharaoh format"
    options.argument("found", type=Path, metavar="FOUND", help=f"file of a model's {form}")
    options.argument(
        "gold",
        type=Path,
        metavar="GOLD",
        help=f"file of reference {form}; 0?1 marks a possible link",
    )
    options.help(ShowHelp, has_more=False)


def _add_curves(options: Options) -> None:
    options.argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="output directories of training runs"
    )
    options.option(
        "output", type=Path, required=True, metavar="FILE", help="the .png or .svg file to write"
    )
    options.help(ShowHelp, has_more=False)


def _add_export(options: Options) -> None:
    options.argument("model", type=Path, metavar="MODEL", help=_MODEL)
    options.option(
        "output", type=Path, required=True, metavar="DIR", help="the directory to create"
    )
    options.option(
        "average",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="average the parameters with those of this model; can be repeated",
    )
    options.option(
        "store",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="type of the stored parameters; the model computes in float32 (default: float32)",
    )
    options.help(ShowHelp, has_more=False)


_SEARCHES = (_finish_search, texts.SELDOM_IN_SEARCH)
# These use only the best target of a source. They accept these only to reject them with a reason.
_BEST = (*_SEARCHES, frozenset({"nbest", "nbest_mass"}))
COMMANDS = (
    Command(
        "info", "Show versions, the CPU's instruction set, and backends.", "", _add_info, _as_given
    ),
    TRAIN,
    Command(
        "predict",
        "Print the target that the model predicts for each source, one per line.",
        "MODEL [TEXT ...] [OPTION ...]",
        _add_predict,
        *_SEARCHES,
    ),
    Command(
        "evaluate",
        "Compute the error rates of a model on its test set.",
        "MODEL [OPTION ...]",
        _add_evaluate,
        *_BEST,
    ),
    Command(
        "explain",
        "Write an HTML page that shows what the model attended to in one source.",
        "MODEL TEXT --output PAGE.html [OPTION ...]",
        _add_explain,
        *_SEARCHES,
    ),
    Command(
        "aer",
        "Print the alignment error rate of links, compared with reference links.",
        "FOUND GOLD",
        _add_aer,
        _as_given,
        module="align",
    ),
    Command(
        "chat",
        "Reply to each line that is typed.",
        "MODEL [OPTION ...]",
        _add_chat,
        *_BEST,
    ),
    Command(
        "curves",
        "Plot the losses and error rates of training runs.",
        "DIR [DIR ...] --output FILE",
        _add_curves,
        _as_given,
    ),
    Command(
        "export",
        "Write the model of a checkpoint without its training state.",
        "MODEL --output DIR [OPTION ...]",
        _add_export,
        _as_given,
    ),
)
