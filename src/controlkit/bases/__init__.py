"""The text-to-image models behind one small interface."""
