"""Policies and scorers: one forward over every layout, loading, saving, adapters, and what makes a CPU fast."""
