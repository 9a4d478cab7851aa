"""Images and pairs on disk -> batches."""
