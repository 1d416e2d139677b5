"""What a draft is, and which of it counts. Nothing here runs a pass."""
