"""What workers read: the feed, embeddings, and item tables."""
