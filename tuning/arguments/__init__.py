"""Command lines. Light: read and checked before torch is imported, so that --help and errors come at once."""
