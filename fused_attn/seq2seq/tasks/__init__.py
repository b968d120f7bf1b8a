"""What a model is trained to do: each task with its data, its options and its measures."""
