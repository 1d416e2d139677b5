"""Models in one GGUF file: header, configuration, weights, tokenizer."""
