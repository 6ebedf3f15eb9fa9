"""Stage 4: a layout for each sequence axis, a schedule for each attention site."""
