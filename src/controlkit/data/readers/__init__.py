"""Every layout of pairs on disk -> one kind of listing. `recognise.py` tells them apart by their content."""
