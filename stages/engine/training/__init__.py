"""The contract of a method (method), the only loop that trains (loop), checkpoints, and what offline methods share."""
