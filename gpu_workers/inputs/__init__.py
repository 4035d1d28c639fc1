"""Inputs of the workers: batches of table rows, embeddings, item tables, sequences."""
