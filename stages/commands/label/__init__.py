"""`alignflow label`: answers go to Label Studio to be judged there; what people said there, in Argilla or in MLflow,
comes back as rows to train on.

Each tool has a file that makes `Told` of its export; of these collected.py makes verdicts like those of
`alignflow rank`, whose rows.py makes the rows.
"""
