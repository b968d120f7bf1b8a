"""The Triton kernels: ``@triton.jit`` functions, tile primitives and launch tables.

This directory is packaged as ``fused_attn.kernels``. Its modules import triton and nothing else:
validation, allocation and autograd belong to ``fused_attn``.
"""

if __name__ == "kernels":
    # The top-level name belongs to another distribution. Ours can only be reached under it by
    # mistake, when the root of a source checkout is on sys.path.
    raise ImportError(
        "this is the source directory of fused_attn.kernels, not a package named 'kernels'; "
        "import fused_attn.kernels, or start Python outside the source checkout (or with -P)"
    )
