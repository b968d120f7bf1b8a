"""Each backend against targets of its own: `cpu` anywhere, `gpu` on a machine with an NVIDIA GPU."""
