"""The models, the speculative step and the training of draft adapters: pure computation."""
