"""Files of controls, in and out."""
