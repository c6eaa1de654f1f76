"""The name under which the pool `nodes` starts a flow run and its stages; the code: flows/execution/clusters/."""

import sys

from flows.execution.clusters.kubernetes import main


def variables() -> list[str]:
    """Names of the variables that the job template of pool `nodes` may set, or sets by itself."""
    from flows.servers import pools  # late: it imports Prefect, for which no stage needs to wait

    return pools.read("nodes")["variables"]["properties"]["env"]["propertyNames"]["enum"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], variables))
