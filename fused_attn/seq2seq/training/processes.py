"""The processes and the device of a training, by Lightning Fabric.

Under ``torchrun`` every process has its share of each batch (`DistributedDataParallel`, gloo on
CPUs and nccl on GPUs); alone, a process takes all of it.
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
from fused_attn.seq2seq.errors import OptionError

# It tells of every process that it starts.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def launch(device: str = "auto", precision: str = "32") -> Fabric:
    """Return the Fabric of this process, one of those that ``torchrun`` started, or the only one.

    device: see `choose_device`; of several processes on GPUs each takes its own. precision: of
    `TrainingConfig`. Raises `InputError` if the device is not there.
    """
    chosen = choose_device(device)
    if precision == "16" and chosen.type == "cpu":
        raise OptionError("precision", "16 needs a GPU; on a CPU there is bf16")
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
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


def leave() -> None:
    """End the process group, if there is one, once nothing of the training is held any more.

    Left to the interpreter's end, a thread of gloo may ask for the interpreter's lock when that is
    gone, and the process dies of ``terminate called without an active exception`` with all done.
    """
    if dist.is_initialized():
        gc.collect()  # a wrapped module holds the group, too
        dist.destroy_process_group()


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """Return the sum of a value over the processes."""
    if fabric.world_size == 1:
        return value
    summed = fabric.all_reduce(value.detach(), reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """Return the value of every process, the first process's first; anything that pickles."""
    if fabric.world_size == 1:
        return [value]
    found: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(found, value)
    return found


def generator_state(fabric: Fabric) -> Tensor:
    """Return the state of torch's generators, of every process: uint8 (processes, N)."""
    state = torch.get_rng_state()
    if fabric.device.type == "cuda":
        state = torch.cat((state, torch.cuda.get_rng_state(fabric.device)))
    return torch.stack(gathered(fabric, state))


def restore_generator(fabric: Fabric, states: Tensor, seed: int) -> None:
    """Go on from what `generator_state` returned.

    With another number of processes, or on another kind of device, there is nothing to go on from:
    the generators are seeded anew then.
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
