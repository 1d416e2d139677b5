"""How a draft learns: the unrolled pass, losses, steps and checkpoints."""
