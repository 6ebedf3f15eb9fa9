"""Communication over torch.distributed: point to point, collectives, and the agreement of ranks before a call."""
