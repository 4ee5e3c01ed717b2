"""New images for predict.py, training and evaluate: batches, starting images, output files."""
