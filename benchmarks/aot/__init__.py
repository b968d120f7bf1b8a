"""The Triton kernels without a GPU: what they compile to, and what a launch costs."""
