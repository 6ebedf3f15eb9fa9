"""What stages 3 and 5 know of each op."""
