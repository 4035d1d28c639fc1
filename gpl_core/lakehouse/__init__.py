"""Delta tables and artifacts without a JVM: snapshots, commits, views and SQL."""
