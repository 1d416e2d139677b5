"""Torch, operation by operation: what every other backend falls back to."""
