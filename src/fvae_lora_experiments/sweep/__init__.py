"""Many runs: planning them, grids, and running them here or on SLURM."""
