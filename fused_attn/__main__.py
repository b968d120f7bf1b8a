"""``python -m fused_attn`` is the ``fused-attn`` command."""

from fused_attn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
