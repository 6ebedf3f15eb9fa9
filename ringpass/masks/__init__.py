"""Attention masks as expressions over batch, head, query and key.  Knows nothing of ranks."""
