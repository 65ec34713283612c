"""Training: objectives, log-probs and batches are plain functions; `worker` runs them under DeepSpeed."""
