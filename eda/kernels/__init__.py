"""Passes of target and draft in C++, for CPUs with bfloat16 products; everything works without them, only slower."""
