"""The name under which the pool `nodes` starts a flow run and its stages; the code: flows/execution/clusters/."""

import sys

from flows.execution.clusters.kubernetes import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
