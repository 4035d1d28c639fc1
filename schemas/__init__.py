"""Table contracts: one YAML file per table."""
