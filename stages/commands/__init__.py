"""Commands for a terminal that need no MLflow, each run as `python -P -m stages.commands.NAME request.json`."""

from stages.commands import lean as lean
