"""`python -m utils.evaluate`: how good new images are. Distances, features, nearest images, likelihood."""
