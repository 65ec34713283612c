"""A run on disk: stages with fingerprints and manifests, who may write, what stays alive between stages."""
