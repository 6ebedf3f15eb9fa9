"""The device and the process group of a script under torchrun: NCCL on GPUs where there are any, else gloo on CPUs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

CHOICES = "auto", "cpu", "cuda"


def start(choice: str = "auto") -> torch.device:
    """Makes the default process group, and the device of this rank current; returns that device.

    choice: "cpu" (gloo), "cuda" (NCCL, the GPU with number LOCAL_RANK), or "auto": the latter where there are GPUs.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device
