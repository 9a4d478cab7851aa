"""The web page: a client of the server, mounted in the same application. It needs the extra `ui`."""
