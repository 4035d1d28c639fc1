"""Similarity, confidence factors and calibrators."""
