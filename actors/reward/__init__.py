"""Rewards: the engine that gives them, how several are combined, and what the best of N samples is worth."""
