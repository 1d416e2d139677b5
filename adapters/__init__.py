"""Adapters as artefacts: files, store, registry, jobs and the worker that makes them."""
