"""Checkpoints: the file, which one (runs), resuming and starting from it, when they are saved."""
