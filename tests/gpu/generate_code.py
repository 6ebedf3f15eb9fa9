"""Writes the code that Inductor makes of one rank's training step, without running it, and counts its calls.

    python -m tests.gpu.generate_code --device cuda --ranks 8 --rank 3 --tokens 8192 --layers 2 --to DIRECTORY

For "cuda" an H100 is described (`tests.support.described_gpu`), which needs a CUDA build of torch, but no GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.support.described_gpu import compile_llama, generated_code
from tests.support.live_buffers import counts, read
from tests.support.pipeline_stages import fake_ring


def main() -> None:
    """Writes forward.py and backward.py; prints how often each operator and kernel is called."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    for name, value in (("ranks", 8), ("rank", 3), ("tokens", 8192), ("layers", 2), ("unroll-limit", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--to", type=Path, default=Path("generated_code"))
    args = parser.parse_args()
    with fake_ring(args.rank, args.ranks), generated_code(args.device) as codes:
        compile_llama(args.device, args.tokens, args.layers, unroll_limit=args.unroll_limit)
    args.to.mkdir(parents=True, exist_ok=True)
    for name, code in zip(("forward", "backward"), codes, strict=True):
        (args.to / f"{name}.py").write_text(code)
        print(name, counts(read(code, {})))


if __name__ == "__main__":
    main()
