"""The encoder-decoder model with attention, and its losses."""
