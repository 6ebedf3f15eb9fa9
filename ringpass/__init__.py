"""ringpass runs an unmodified PyTorch model on P ranks, with its sequence sharded over them.

    model = torch.compile(model, backend="ring_dilated")

needs no import of this package.  Besides the backend it has

    RingConfig                         the options of the backend, documented one by one
    patterns, top_blocks, Dilation     values of options
    Machine, Dimension                 what computing and transfers cost, for the option `machine`
    reference                          dense attention on one device that defines what the options mean
    sharded, local, tokens_of          tensors of which each rank holds its tokens
    explain                            what the backend would make of a model on P ranks, as a report
    metrics, watch                     what the ring does in numbers, and a warning of waits that last long
    errors                             the errors that the package raises
"""

from ringpass import metrics
from ringpass.config import RingConfig
from ringpass.errors import InputError, MismatchError, OptionError, PeerError, RingpassError, UnsupportedError
from ringpass.explain.run import explain
from ringpass.schedule.block_selection import top_blocks
from ringpass.schedule.dilation import Dilation
from ringpass.schedule.machine import Dimension, Machine
from ringpass.shards import local, sharded, tokens_of
from ringpass.stalls import watch

__all__ = [
    "Dilation", "Dimension", "InputError", "Machine", "MismatchError", "OptionError", "PeerError", "RingConfig",
    "RingpassError", "UnsupportedError", "explain", "local", "metrics", "sharded", "tokens_of", "top_blocks", "watch",
]  # fmt: skip
__version__ = "0.1.0"
