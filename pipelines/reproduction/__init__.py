"""The papers' claims at small scale: tasks with checkable answers, tiny models from scratch, arms, search, tables."""
