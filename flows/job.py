"""The name under which work pools start a flow run; the code is in flows/execution/job.py."""

from flows.execution.job import main

if __name__ == "__main__":
    main()
