"""Served models: reward models, a policy with Best-of-N, and a judge, behind one HTTP gateway on Ray Serve."""
