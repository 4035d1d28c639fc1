"""What bench_interest_quality needs: the data, the models beside ours, the metrics."""
