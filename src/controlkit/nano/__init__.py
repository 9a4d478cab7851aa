"""What only the embedded base needs: its drawings of icons, its training and its evaluation sets."""
