"""The command line: one thin file per verb, which parses, calls and prints."""
