"""Stage 3: which dims of which tensors are the same index."""
