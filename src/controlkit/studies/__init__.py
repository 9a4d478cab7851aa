"""The papers' tables and figures as experiments that run on any base, resume, and say what did not reproduce."""
