"""When and where things run: Prefect flows and the command line. Nothing here imports torch."""
