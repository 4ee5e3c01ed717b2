"""`python -m utils.convert`: checkpoints to and from the formats of others."""
