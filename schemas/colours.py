"""The colours of models, the same ones in the report's table, its pictures and MLflow's charts."""

COLOURS = {"base": "#9aa1ac", "sft": "#64748b", "dpo": "#3b82f6", "kto": "#f59e0b", "ppo": "#10b981"}
"""Of the names that every run has."""

SPARE_COLOURS = ["#ec4899", "#8b5cf6", "#ef4444", "#14b8a6", "#a16207", "#6366f1"]
"""Of others, in turn."""
