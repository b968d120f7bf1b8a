"""Each backend against targets of its own: `cpu` here, `gpu` on a machine with a GPU."""
