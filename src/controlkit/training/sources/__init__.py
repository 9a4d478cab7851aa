"""Where the data of training a control comes from: one file for each source, found through `registry`."""
