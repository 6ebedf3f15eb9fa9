"""Which rank holds which tokens, and how tokens travel from one layout to another."""
