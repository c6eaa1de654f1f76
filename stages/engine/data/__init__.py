"""From rows to batches: codec (text to token ids), examples (rows to trees), trees (to batches), segments, order."""
