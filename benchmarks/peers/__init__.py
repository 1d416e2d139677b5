"""What users would pick instead of this server, one module for each, behind ``interface.py``."""
