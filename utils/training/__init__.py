"""Training outside the loop: optimizer, randomness, validation, memory, and the files of a run.

`config` is train.py's Config, and `context` its TrainContext: network, data and optimizer.
"""
