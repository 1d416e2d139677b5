"""The process that does jobs, and what its stages compute."""
