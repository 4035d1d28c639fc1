"""Semantic IDs: frozen encoders, residual quantizers, the catalog of issued SIDs and its prefix trie."""
