"""Where a stage runs: as a process here, on a work pool, or as a Slurm job; the devices and leases that it holds."""
