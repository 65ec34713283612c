"""Who is told how a run goes: the terminal, logs, progress on disk, Prometheus, the metadata of a submitted job."""
