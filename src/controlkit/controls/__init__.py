"""Control systems: `control.py` is the interface, `registry.py` collects them, and each system is one file."""
