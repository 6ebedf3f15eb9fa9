"""ringpass: an unmodified PyTorch model over P ranks, its sequence partitioned.

    model = torch.compile(model, backend="ring_dilated")

needs no import of this package.  What it offers beside the backend: `RingConfig`, the options; `patterns`,
`top_blocks` and `Dilation`, values of options; `reference`, what they mean, dense and plain; `sharded`, `tokens_of` and
`local`, for tensors of which each rank has its own tokens; `errors`.
"""

from ringpass.config import RingConfig
from ringpass.errors import InputError, MismatchError, OptionError, PeerError, RingpassError, UnsupportedError
from ringpass.schedule.block_selection import top_blocks
from ringpass.schedule.dilation import Dilation
from ringpass.shards import local, sharded, tokens_of

__all__ = [
    "Dilation", "InputError", "MismatchError", "OptionError", "PeerError", "RingConfig", "RingpassError",
    "UnsupportedError", "local", "sharded", "tokens_of", "top_blocks",
]  # fmt: skip
__version__ = "0.1.0"
