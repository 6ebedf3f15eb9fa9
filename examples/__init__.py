"""Examples; run from the repository's root."""
