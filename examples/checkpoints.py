"""Checkpoints of a training: whole or not there, the newest few kept, the same for any number of ranks.

    checkpoints = Checkpoints(folder, keep=2)
    step = checkpoints.newest()                 # 0 if there is none
    checkpoints.load(state, step)               # fills `state`
    checkpoints.save(state, step)               # every so many steps

`state` is what torch.distributed.checkpoint takes: a dict of tensors, numbers and other values, by name.  All ranks
call these, in the same order, and see one folder.  A checkpoint is written beside the others under another name, and
gets its own when it is complete, so that a process that dies at any moment leaves only complete ones.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class Checkpoints:
    """The checkpoints `step_000012` of a folder.  `keep`: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, the newest last."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> int:
        """The step of the newest checkpoint, 0 if there is none.  Removes what a death has left unfinished."""
        newest = torch.zeros(1, dtype=torch.int64)
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.folder.glob("*.partial"), *self.folder.glob("*.removed")]:
                shutil.rmtree(path)
            newest += max(self.steps(), default=0)
        dist.broadcast(newest, 0)  # one rank looks, so that all load the same
        return int(newest)

    def load(self, state: dict[str, Any], step: int) -> None:
        """Fills `state`, which has the names and shapes of what was saved, from the checkpoint of a step."""
        load(state, checkpoint_id=self._path(step))

    def save(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint of a step above 0, which all ranks divide among them, and removes the oldest ones."""
        partial = self._path(step, ".partial")
        save(state, checkpoint_id=partial)  # returns once all ranks have written, and synced, their files
        if dist.get_rank() == 0:
            os.rename(partial, self._path(step))
            self._sync()
            for old in self.steps()[: -self.keep]:
                os.rename(self._path(old), self._path(old, ".removed"))
                shutil.rmtree(self._path(old, ".removed"))

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step_{step:06d}{suffix}"

    def _sync(self) -> None:
        """Makes the renames last."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
