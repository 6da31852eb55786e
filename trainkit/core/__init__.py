"""The kernel: a step, its windows, and the update."""
