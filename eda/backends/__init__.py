"""Who computes a step: torch operation by operation, recordings of it, or C++ on CPUs."""
