"""The GPU backends, stage by stage: `make gpu-check`."""
