"""A recorded run again: what differs from then, the run itself, and whether its scores come out the same."""
