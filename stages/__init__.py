"""What is done: every stage is one file or folder here; `python -P -m stages NAME request.json` runs one."""
