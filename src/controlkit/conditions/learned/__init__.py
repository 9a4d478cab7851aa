"""Conditions that need a learned model: its weights come from a folder or the Hugging Face hub.

They stand in the same registry as the others. `models.py` (one room up) says what a model is, where its weights are
looked for and how they are loaded; `inputs.py` turns an image into what a network reads.
"""
