"""ringpass: an unmodified PyTorch model over P ranks, its sequence partitioned.

    model = torch.compile(model, backend="ring_dilated")

needs no import of this package.  What it offers beside the backend: `RingConfig`, the options; `errors`.
"""

from ringpass.config import RingConfig
from ringpass.errors import MismatchError, OptionError, PeerError, RingpassError, UnsupportedError

__all__ = ["MismatchError", "OptionError", "PeerError", "RingConfig", "RingpassError", "UnsupportedError"]
__version__ = "0.1.0"
