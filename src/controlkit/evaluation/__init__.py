"""How good a base and a control are, on held-out data, with a baseline and a ceiling beside every number."""
