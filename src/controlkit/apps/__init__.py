"""The command line. Each verb is one thin file that parses, calls and shows."""
