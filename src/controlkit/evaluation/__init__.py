"""Evaluation of bases and controls on held-out images, with a baseline and a ceiling for every score."""
