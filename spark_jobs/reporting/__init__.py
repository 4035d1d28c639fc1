"""The report: bounded aggregates, plots, lineage and the page."""
