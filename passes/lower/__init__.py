"""Stage 6: the graphs that AOTAutograd derived -> the graphs that are compiled."""
