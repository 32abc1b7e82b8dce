"""Studies of pruning: tasks, sweeps over methods and budgets, tables, curves and pictures."""
