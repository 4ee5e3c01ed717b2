"""`python -m utils.convert`: checkpoints to and from the formats of others.

A command: nothing but tests imports from it.
"""
