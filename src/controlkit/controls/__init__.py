"""The systems of control: `control.py` is the contract, `registry.py` collects them, then one file for each."""
