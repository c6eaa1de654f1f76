"""Commands for a terminal, and what flows ask of torch beside the stages, each run as `python -P -m
stages.commands.NAME request.json`."""

from stages.commands import lean as lean
