"""Source-target pairs: files, alignment links, tokenizers, and training batches."""
