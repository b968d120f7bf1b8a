"""The suite: ours against what people use in its place, at three levels."""
