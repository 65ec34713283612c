"""Rewards: how several are combined, and what the best of N samples is worth."""
