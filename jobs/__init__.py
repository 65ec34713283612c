"""What a person runs: one script a job. Config in, order of stages, nothing else."""
