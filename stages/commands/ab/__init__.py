"""`alignflow ab`: people judge two evaluated models blind, and the judge is held against them.

The answers are those of the evaluations: drawn with the seeds that all models share, and judged already. The page and
the terminal are those of `alignflow rank`.
"""
