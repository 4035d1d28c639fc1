"""Raw tables for development: a simulated marketplace and the import of real purchases."""
