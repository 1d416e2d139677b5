"""Chat templates of strangers, rendered in processes with limits."""
