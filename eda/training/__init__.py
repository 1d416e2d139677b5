"""Training of the shared draft and of private modules: regenerate, select, train, evaluate."""
