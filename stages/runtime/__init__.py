"""What stages and flows share of a machine: the home, locks, atomic files, processes that die with their parent."""
