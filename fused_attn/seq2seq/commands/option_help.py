"""The help texts of the options, by field of the configurations; `config` explains the fields."""

from __future__ import annotations

from fused_attn.choices import LOCALS
from fused_attn.seq2seq.config import (
    BRIDGES,
    CELLS,
    LENGTH_PENALTIES,
    LR_SCHEDULES,
    PRECISIONS,
    SAMPLING_UNITS,
    SCHEDULES,
    SCORES,
)
from fused_attn.seq2seq.data.pairs import DEV_SHARE
from fused_attn.seq2seq.data.tokenizers import TOKENS
from fused_attn.seq2seq.tasks.scan_grammar import SPLITS

MODEL_HELP = {
    "hidden": "width of the decoder",
    "embedding": "width of the embeddings",
    "layers": "layers of decoder and encoder",
    "dropout": "dropout probability",
    "cell": f"recurrent cell: {', '.join(CELLS)}",
    "bidirectional": "read the source in both directions",
    "score": f"attention score: {', '.join(SCORES)}",
    "input_feeding": "feed the attentional state to the next step",
    "encoder_hidden": "width of each direction of the encoder (default: --hidden)",
    "encoder_layers": "recurrent layers of the encoder (default: --layers)",
    "residual": "add the input of a recurrent layer to its output if their widths are equal",
    "share": "use the same recurrent layers in encoder and decoder",
    "tie": "weights to share: output (target embedding and output layer) or all (also the source "
    "embedding)",
    "reverse_source": "read the source backwards",
    "bridge": f"initial state of the decoder: {', '.join(BRIDGES)}",
    "attn_dim": "width of the concat score (default: width of the encoder's output)",
    "local": f"local attention: {' or '.join(LOCALS)}",
    "window": "half-width of the local attention window",
    "max_source": "maximum length of a source in symbols, for --score location",
    "coverage": "feed the sum of the earlier attention weights to the concat score",
    "variational": "use one dropout mask for all steps of a sequence",
}
TRAINING_HELP = {
    "epochs": "passes over the pairs",
    "batch_size": "pairs in a batch",
    "batch_tokens": "symbols in a batch, padding included",
    "lr": "peak learning rate",
    "label_smoothing": "probability spread over all symbols",
    "patience": "stop after this many epochs without improvement",
    "precision": f"{', '.join(PRECISIONS)}; the last two are mixed",
    "seed": "random seed",
    "max_steps": "stop after this many steps, and fit the schedules to them (default: no limit)",
    "lr_schedule": f"learning rate after the warm-up: {', '.join(LR_SCHEDULES)}",
    "warmup": "fraction of the steps during which the learning rate rises",
    "bucket": "fill batches with sources of equal length: faster, but batches are less mixed",
    "accumulate": "compute every batch in this many parts (gradient accumulation), to save memory",
    "clip": "maximum norm of the gradient",
    "coverage_loss": "weight of the coverage loss",
    "guided": "weight of the guided alignment loss, for pairs with links",
    "rdrop": "weight of the R-Drop loss, which makes two passes with different dropout agree",
    "teacher_weight": "fraction of the loss that comes from the teachers",
    "sampling": f"scheduled sampling: {', '.join(SCHEDULES)}",
    "sampling_max": "final probability of feeding the model its own symbols",
    "sampling_per": f"draw once per {' or '.join(SAMPLING_UNITS)}",
    "sampling_after": "start scheduled sampling when the development error is at most this "
    "(default: at once)",
}
SEARCH_HELP = {
    "beam": "beam size; 1 is greedy search",
    "nbest": "targets to return for each source, at most --beam",
    "nbest_mass": "return the fewest best targets whose probabilities add up to at least this, at "
    "most --nbest, or --beam",
    "max_length": "maximum length of a target (default: twice the source length plus 10, or more "
    "if training targets were longer)",
    "length_penalty": f"what the log-probability is divided by: {', '.join(LENGTH_PENALTIES)}",
    "sample": "draw at random instead of searching",
    "alpha": "exponent of --length-penalty gnmt",
    "coverage_penalty": "weight of the penalty on source positions that were not attended to",
    "min_length": "minimum length of a target",
    "block_ngrams": "never repeat an n-gram of this many symbols; 0 means no limit",
    "temperature": "temperature of --sample; below 1 is sharper",
    "top_k": "let --sample draw only from this many likeliest symbols; 0 means all",
    "top_p": "let --sample draw only from the likeliest symbols, up to this total probability",
    "seed": "seed of --sample (default: a different one each time)",
}
TASK_SUMMARIES = {
    "g2p": "words to phones (pronunciations), from the CMU dictionary",
    "scan": "commands to actions, generated from the SCAN grammar",
    "reverse": "sequences of numbers to the same numbers in reverse order, generated",
    "pairs": "your own lines: source TAB target",
    "translate": "your own sentences in two languages, split into subwords, scored by BLEU",
    "chat": "utterances to replies, from chatterbot-corpus or your dialogs",
}
_TEXT_HELP = {
    "tokens": f"symbols: {', '.join(TOKENS)}",
    "vocabulary": "number of subwords to learn",
    "min_count": "treat symbols that occur less often than this as unknown",
    "max_length": "maximum length of a line in symbols",
    "skip_bad": "skip lines that cannot be used",
}
_PAIRS_HELP = {
    "train": "training pairs: a file with SOURCE TAB TARGET on each line, or two files as "
    "SOURCES,TARGETS",
    "dev": f"development pairs (default: {100 * DEV_SHARE:g} %% of --train)",
    **_TEXT_HELP,
    "source_tokens": "what a symbol of a source is (default: --tokens)",
    "target_tokens": "what a symbol of a target is (default: --tokens)",
}
TASK_HELP: dict[str, dict[str, str]] = {
    "g2p": {
        "limit_words": "train on only this many words (default: all)",
        "lexicon": "file of more words to train on, with WORD PHONE PHONE ... on each line",
    },
    "scan": {"split": f"how to split the commands: {', '.join(SPLITS)}"},
    "reverse": {
        "numbers": "how many different numbers there are",
        "pairs": "how many training pairs to generate",
        "longest": "maximum length of a training sequence",
        "test_longest": "maximum length of a test sequence",
    },
    "pairs": _PAIRS_HELP,
    "translate": _PAIRS_HELP,
    "chat": {
        "corpus": "language of the dialogs from chatterbot-corpus",
        "dialogs": "a file of your own dialogs to use instead: one utterance per line, a blank "
        "line between dialogs",
        **_TEXT_HELP,
    },
}
# --test sets a field with a different name. Tasks that are not listed have no --test.
TEST_HELP = {
    "g2p": "file of words to hold out as the test set, alone or with their phones (default: chosen "
    "by a hash)",
    "scan": "file of commands to hold out as the test set of --split simple (default: chosen by a "
    "hash)",
    "pairs": "test pairs, for 'fused-attn evaluate'",
    "translate": "test pairs, for 'fused-attn evaluate'",
}

# Fields that name files.
FILES = frozenset({"train", "dev", "lexicon", "dialogs"})
# What `train --help` shows when no task is given.
EVERY_TASK = frozenset(
    {"output", "resume", "start_from", "hidden", "epochs", "lr", "seed", "device", "threads"}
)
# What --help leaves to --help-all.
SELDOM_IN_TRAINING = frozenset(
    {
        *("teacher", "tensorboard", "on_disk", "backend"),
        *("encoder_hidden", "encoder_layers", "residual", "share", "tie", "reverse_source"),
        *("bridge", "attn_dim", "local", "window", "max_source", "coverage", "variational"),
        *("bucket", "accumulate", "lr_schedule", "warmup", "clip", "coverage_loss", "guided"),
        *("rdrop", "teacher_weight", "sampling", "sampling_max", "sampling_per", "sampling_after"),
        "max_steps",
    }
)
SELDOM_IN_SEARCH = frozenset(
    {
        *("alpha", "coverage_penalty", "min_length", "block_ngrams", "length_penalty"),
        *("temperature", "top_k", "top_p", "seed", "backend", "compute"),
        *("nbest_mass", "with_alignment"),
    }
)
