"""Semantic IDs: frozen encoders, residual quantisers, the catalogue of issued SIDs and its prefix trie."""
