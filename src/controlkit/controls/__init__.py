"""The networks that steer: `control.py` is the contract, then one file for each system."""
