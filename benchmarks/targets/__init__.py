"""Each backend against its own targets: `cpu` anywhere, `gpu` on a machine with an NVIDIA GPU."""
