"""Commands of the `eda` console script, one module each."""
