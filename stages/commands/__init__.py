"""Commands for a terminal that need no MLflow, each run as `python -P -m stages.commands.NAME request.json`."""
