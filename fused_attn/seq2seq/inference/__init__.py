"""Trained models at work: predictions, evaluation, alignments, whole files."""
