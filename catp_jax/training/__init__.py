"""Training: optax loops and the models that ship with the package."""
