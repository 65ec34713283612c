"""Judges: their settings, endpoints that are asked, and answers that are kept."""
