"""Resources of the machine: memory of a job and its release, choice of a GPU."""
