"""Objectives, the one training loop, recipes, state and previews."""
