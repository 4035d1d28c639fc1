"""The reference pre-ranker: model, dual-label loss, metrics."""
