"""Attention of one tile on one device."""
