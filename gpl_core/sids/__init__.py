"""Semantic IDs: encoders, tokeniser, catalogue, health."""
