"""One module per `gpl` command."""
