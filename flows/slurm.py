"""The name under which Slurm pools start a flow run and its stages; the code: flows/execution/clusters/slurm.py."""

import sys

from flows.execution.clusters.slurm import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
