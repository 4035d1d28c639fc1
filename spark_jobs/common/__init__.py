"""What several Spark jobs share."""
