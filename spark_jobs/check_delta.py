"""Starts Spark once with Delta: resolves the jars, fails with a message when they are not on the class path."""

from __future__ import annotations

from spark_jobs.session import start_session


def main() -> None:
    """Start and stop a session."""
    spark = start_session("check-delta")
    spark.stop()


if __name__ == "__main__":
    main()
