"""What the command line says of each field of the configurations; `config` has it in full."""

from __future__ import annotations

from fused_attn.seq2seq.config import (
    BRIDGES,
    CELLS,
    LENGTH_PENALTIES,
    LOCALS,
    LR_SCHEDULES,
    PRECISIONS,
    SAMPLING_UNITS,
    SCHEDULES,
    SCORES,
)
from fused_attn.seq2seq.data.tokenizers import TOKENS
from fused_attn.seq2seq.tasks.scan_grammar import SPLITS

MODEL_HELP = {
    "cell": f"recurrent cell: {', '.join(CELLS)}",
    "hidden": "width of the decoder",
    "encoder_hidden": "width of each direction of the encoder (default: that of the decoder)",
    "embedding": "width of the embeddings",
    "layers": "recurrent layers of the decoder",
    "encoder_layers": "recurrent layers of the encoder (default: those of the decoder)",
    "bidirectional": "read the source from both ends",
    "residual": "add a recurrent layer's input to its output",
    "share": "one set of recurrent layers for encoder and decoder",
    "tie": "output: the output layer is the target's embeddings; all: the source's too",
    "reverse_source": "read the source from its end",
    "bridge": f"how the decoder starts: {', '.join(BRIDGES)}",
    "score": f"attention score: {', '.join(SCORES)}",
    "attn_dim": "width of the concat score (default: that of the memory)",
    "local": f"local attention: {' or '.join(LOCALS)}",
    "window": "half-width of local attention",
    "max_source": "longest source, for the score location",
    "coverage": "tell the concat score what has been looked at",
    "input_feeding": "feed the attentional state into the next step",
    "dropout": "probability of dropout",
    "variational": "drop the same columns at every step",
}
TRAINING_HELP = {
    "epochs": "passes over the training pairs",
    "batch_size": "pairs in a batch",
    "bucket": "put sources of one length into a batch: faster steps, of less variety",
    "batch_tokens": "symbols in a batch, padding counted, in place of --batch-size",
    "accumulate": "work on a batch in so many parts, to spare memory",
    "precision": f"of the training: {', '.join(PRECISIONS)}",
    "lr": "highest learning rate",
    "lr_schedule": f"how the rate goes on after its rise: {', '.join(LR_SCHEDULES)}",
    "warmup": "share of the steps in which the rate rises",
    "patience": "stop after so many epochs without a best rate (default: go on)",
    "clip": "largest norm of the gradient",
    "label_smoothing": "share of the probability spread over all symbols",
    "coverage_loss": "weight of the coverage loss",
    "guided": "weight of the guided alignment loss, for pairs with links",
    "rdrop": "weight of R-Drop: two passes of a pair under different dropout agree",
    "teacher_weight": "share of the loss that is the teachers', with --teacher",
    "sampling": f"scheduled sampling: {', '.join(SCHEDULES)}",
    "sampling_per": f"draw for each {' or '.join(SAMPLING_UNITS)}",
    "sampling_max": "probability of the model's own symbols at the end",
    "sampling_after": "begin with it once the first rate on the development set is at most this",
    "seed": "seed of parameters, dropout and order",
    "max_steps": "plan for at most so many steps (default: all epochs)",
}
SEARCH_HELP = {
    "beam": "hypotheses followed at once",
    "nbest": "targets for each source, a line each",
    "length_penalty": f"what the log-probability is divided by: {', '.join(LENGTH_PENALTIES)}",
    "alpha": "exponent of the gnmt length penalty",
    "coverage_penalty": "weight of the penalty for what of the source was not read",
    "min_length": "symbols at least",
    "max_length": "symbols at most (default: twice the source and 10 more)",
    "block_ngrams": "let no sequence of so many symbols come twice",
    "sample": "draw symbols instead of taking the likeliest",
    "temperature": "of the draw; below 1 is sharper",
    "top_k": "draw from so many symbols only",
    "top_p": "draw from the likeliest symbols whose probabilities reach this",
    "seed": "seed of the draw",
}
TASK_SUMMARIES = {
    "g2p": "words to phones",
    "scan": "commands to actions",
    "reverse": "sequences turned around",
    "pairs": "your own lines, source TAB target",
    "translate": "sentences, with subwords, judged by BLEU",
    "chat": "utterances to the next ones",
}
TASK_HELP: dict[str, dict[str, str]] = {
    "g2p": {
        "limit_words": "g2p: train on so many words only (default: all)",
        "lexicon": "g2p: a file of more words to train on, lines WORD PHONE PHONE ...",
    },
    "scan": {"split": f"scan: {', '.join(SPLITS)}"},
    "reverse": {
        "numbers": "reverse: different numbers",
        "pairs": "reverse: training pairs",
        "longest": "reverse: longest sequence in training",
        "test_longest": "reverse: longest sequence in the test",
    },
    "pairs": {
        "train": "pairs, translate: the file to train on, or SOURCES,TARGETS",
        "dev": "pairs, translate: the file that chooses the best (default: 2 %% of train)",
        "tokens": f"text: what a symbol is: {', '.join(TOKENS)}; translate and chat: subwords",
        "source_tokens": "pairs, translate: what a symbol of sources is (default: as --tokens)",
        "target_tokens": "pairs, translate: what a symbol of targets is (default: as --tokens)",
        "vocabulary": "text: subwords to learn; chat: 4000",
        "min_count": "text: rarer symbols are read as unknown",
        "max_length": "text: longest source or target in symbols; translate: 100, chat: 80",
        "skip_bad": "text: leave out lines that cannot be used, and count them; chat: yes",
    },
    "translate": {},
    "chat": {
        "corpus": "chat: language of chatterbot-corpus",
        "dialogs": "chat: a file of utterances instead, a blank line between dialogs",
    },
}
