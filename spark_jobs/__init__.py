"""Spark entry points, one thin module per job."""
