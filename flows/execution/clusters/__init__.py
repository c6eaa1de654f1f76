"""Stages as jobs of a cluster's own scheduler: each launcher submits a stage, passes its lines on, ends as it ends."""
