"""What a run found, for a person: one page without network, and the same as Markdown."""
