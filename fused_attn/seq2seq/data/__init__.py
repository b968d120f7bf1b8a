"""Pairs of sequences: files, links, tokenizers, and batches for training."""
