"""How the keys of other ranks come, and their gradients go home."""
