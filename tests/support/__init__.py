"""Models, passes, decoders and references that tests share."""
