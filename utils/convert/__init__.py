"""`python -m utils.convert`, a command: nothing but tests imports from it."""
