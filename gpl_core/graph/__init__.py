"""The graph of steps as data, what the tables say about it, and how steps are launched and run."""
