"""Adaptation jobs: what was asked for, the queue, and the order of stages."""
