"""Models: one file each, its config dataclass beside it. They know pruners only by the contract."""
