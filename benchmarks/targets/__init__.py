"""Parts of the package against their targets: `cpu` and `decoder` anywhere, `gpu` on a GPU."""
