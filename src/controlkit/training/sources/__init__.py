"""Sources of training data for controls, one file each, found through `registry`."""
