"""Stage 5: the program of one rank."""
