"""What each subcommand of ``fused-attn`` does with its options."""
