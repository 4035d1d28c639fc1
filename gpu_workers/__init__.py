"""DeepSpeed entry points, one thin module per worker."""
