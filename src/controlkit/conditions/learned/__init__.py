"""Conditions computed by a learned model, whose weights come from a folder or the Hugging Face hub.

They are in the same registry as the others. `conditions/models.py` finds and loads weights, `inputs.py` preprocesses
images.
"""
