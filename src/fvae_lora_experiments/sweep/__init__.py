"""Many runs: which, a grid of them, doing them here or on SLURM."""
