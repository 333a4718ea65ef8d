"""Sources: where images come from when there is no data."""
