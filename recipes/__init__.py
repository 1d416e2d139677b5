"""How the bundled models are made, runnable end to end."""
