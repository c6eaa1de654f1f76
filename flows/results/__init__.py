"""What runs left behind, by the names that people use: models, comparisons, lineage, the registry, exports."""

LISTED = 20
"""Runs that a list shows, and that no clearing up removes."""
