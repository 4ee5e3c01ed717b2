"""Training outside the loop. `config` is train.py's Config, and `context` its TrainContext."""
