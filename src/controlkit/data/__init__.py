"""Pictures and pairs on disk -> batches."""
