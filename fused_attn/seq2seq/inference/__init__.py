"""Using trained models: prediction, evaluation, alignments, and large files."""
