"""Passes of fixed shape, which can be recorded once and replayed: CUDA graphs where there is a GPU."""
