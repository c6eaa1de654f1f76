"""What runs left behind, by the names that people use: models, comparisons, lineage, the registry, exports."""
