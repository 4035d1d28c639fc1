"""The proof by controls: a simulated marketplace in memory, label variants, and their judge."""
