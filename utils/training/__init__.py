"""Training beside the loop: resuming, files of a run, optimizer, randomness, validation, memory.

train.py imports from it; it imports no networks.
"""
