"""Table contracts: the only place where a column is declared, read from `schemas/`."""
