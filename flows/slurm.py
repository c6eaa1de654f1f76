"""The name under which Slurm pools start a flow run and its stages; the code is in flows/execution/slurm.py."""

import sys

from flows.execution.slurm import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
