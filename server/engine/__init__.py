"""The serving engine: sequences, scheduling, and the thread that steps the decoder."""
