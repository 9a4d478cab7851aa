"""Readers: every layout of pairs on disk -> a `Listing`. `recognise.py` detects the layout from the content."""
