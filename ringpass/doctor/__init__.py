"""Look for what keeps ringpass from running on this machine, and say how to repair it.

    ringpass doctor                                    this host: versions, devices, compiler, caches, network, 2 ranks
    torchrun --nproc-per-node 4 -m ringpass doctor     the ranks of torchrun: whether all start, and reach each other

Under torchrun rank 0 prints what it finds, and the problems of the other ranks.  No check waits longer than --timeout
seconds for anything, nor does it change anything but a few files in Inductor's cache directory.

Exit code: 0 if there is no problem (warnings do not count), 1 if there is one, 2 for arguments that make no sense.
"""

from ringpass.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
