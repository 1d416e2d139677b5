"""Passes of target and draft in C++ for CPUs; everything works without them, only slower."""
