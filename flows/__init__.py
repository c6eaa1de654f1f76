"""When and where things run: Prefect flows and the command line. Nothing here imports torch."""

import gc

# The default looks for garbage after every 700 objects: a fifth of what an import of Prefect or MLflow takes, and there
# is none. Stages, whose garbage may be on a GPU, see to it by themselves.
gc.set_threshold(10_000)
