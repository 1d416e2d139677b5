"""What lies on disk: configurations, weights, tokenizers and chat templates, checked before they are used."""
