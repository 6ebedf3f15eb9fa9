"""ringpass: an unmodified PyTorch model over P ranks, its sequence partitioned.

    model = torch.compile(model, backend="ring_dilated")

needs no import of this package.  What it offers beside the backend: `RingConfig`, the options; `patterns` and
`top_blocks`, values of the options `mask` and `approximate`; `errors`.
"""

from ringpass.config import RingConfig
from ringpass.errors import MismatchError, OptionError, PeerError, RingpassError, UnsupportedError
from ringpass.selection import top_blocks

__all__ = ["MismatchError", "OptionError", "PeerError", "RingConfig", "RingpassError", "UnsupportedError", "top_blocks"]
__version__ = "0.1.0"
