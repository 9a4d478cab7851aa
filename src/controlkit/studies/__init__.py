"""Studies: tables and figures of papers as experiments on any base. They resume, and report what did not reproduce."""
