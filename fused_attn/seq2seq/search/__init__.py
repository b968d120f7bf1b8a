"""Finding targets: greedy, sampling and beam search, with one model or several."""
