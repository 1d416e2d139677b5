"""Who gets served when: continuous batching, HTTP, command line."""
