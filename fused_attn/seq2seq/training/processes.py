"""The processes and the device of a training run, managed by Lightning Fabric.

Under ``torchrun`` each process handles its share of every batch (`DistributedDataParallel`, with
gloo on CPUs and nccl on GPUs). A single process handles whole batches.
"""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor

from fused_attn.seq2seq.devices import choose_device
from fused_attn.seq2seq.errors import InputError, OptionError

# At INFO it logs every process that joins.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def launch(device: str = "auto", precision: str = "32") -> Fabric:
    """Return the launched Fabric of this process, which may be one of several under ``torchrun``.

    device: see `choose_device`. Each of several processes on GPUs gets a GPU of its own.
    precision: as in `TrainingConfig`.

    Raises `InputError` if the device is not available or does not support the precision.
    """
    chosen = choose_device(device)
    if precision == "16" and chosen.type == "cpu":
        raise OptionError("precision", "16 needs a GPU; on a CPU use bf16")
    world, local = from_launcher("WORLD_SIZE"), from_launcher("LOCAL_WORLD_SIZE")
    several = world > 1
    devices: Any = local if several or chosen.index is None else [chosen.index]
    fabric = Fabric(
        accelerator=chosen.type,
        devices=devices,
        num_nodes=max(1, world // local),
        strategy="ddp" if several else "auto",
        precision=_PRECISIONS[precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def from_launcher(name: str) -> int:
    """Return a number that ``torchrun`` sets in the environment: of a single process if it is not.

    name: "RANK", "WORLD_SIZE" or "LOCAL_WORLD_SIZE". Raises `InputError` if it is not a number.
    """
    least = 0 if name == "RANK" else 1
    text = os.environ.get(name, str(least))
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise InputError(
            f"the environment variable {name} must be a number from {least}, got {text!r}: unset "
            "it, or start the processes with torchrun"
        )
    return int(text)


def leave() -> None:
    """Destroy the process group, if there is one. Call it when nothing refers to the trainer.

    If that is left to the exit of the interpreter, a thread of gloo may request the GIL when it no
    longer exists. The process then dies with ``terminate called without an active exception``,
    although all work is done.
    """
    if dist.is_initialized():
        gc.collect()  # a wrapped module refers to the group
        dist.destroy_process_group()


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """Return the sum of a value over the processes."""
    if fabric.world_size == 1:
        return value
    summed = fabric.all_reduce(value.detach(), reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """Return the values of all processes, by rank. A value may be anything that can be pickled."""
    if fabric.world_size == 1:
        return [value]
    found: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(found, value)
    return found


def generator_state(fabric: Fabric) -> Tensor:
    """Return the states of torch's generators in all processes: uint8 (world size, N)."""
    state = torch.get_rng_state()
    if fabric.device.type == "cuda":
        state = torch.cat((state, torch.cuda.get_rng_state(fabric.device)))
    return torch.stack(gathered(fabric, state))


def restore_generator(fabric: Fabric, states: Tensor, seed: int) -> None:
    """Restore the generators from the states that `generator_state` returned.

    If the number of processes or the type of the device has changed, there is no state to restore;
    the generators are then seeded with ``seed`` plus the rank.
    """
    size = torch.get_rng_state().numel()
    on_gpu = fabric.device.type == "cuda"
    if len(states) != fabric.world_size or on_gpu != (states.shape[1] > size):
        torch.manual_seed(seed + fabric.global_rank)
        return
    state = states[fabric.global_rank]
    torch.set_rng_state(state[:size].clone())
    if on_gpu:
        torch.cuda.set_rng_state(state[size:].clone(), fabric.device)
