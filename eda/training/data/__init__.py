"""What a draft learns from: prompts, answers, and the target's states over them."""
