"""Versions of adapters on disk."""
