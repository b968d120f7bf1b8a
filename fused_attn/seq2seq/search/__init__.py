"""Decoding: greedy search, sampling and beam search, with one model or an ensemble."""
