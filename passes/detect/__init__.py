"""Stage 2: the attention sites of a captured graph, each with its mask as an expression."""
