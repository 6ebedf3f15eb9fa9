"""Reading the code that Inductor generates."""

from __future__ import annotations


def ring_calls(code: str) -> list[str]:
    """The ring's ring_calls in generated code, in order."""
    names = ("exchange", "wait", "attention_tile_backward", "attention_tile")
    found = []
    for line in code.splitlines():
        for name in names:
            if f"torch.ops.ringpass.{name}.default(" in line:
                found.append(name)
                break
    return found
