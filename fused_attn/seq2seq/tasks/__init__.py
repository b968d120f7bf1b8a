"""The tasks a model can be trained on, each with its data, options and metrics."""
