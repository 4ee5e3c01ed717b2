"""`python -m utils.evaluate`: FID, KID, precision and recall, nearest images, bits per dimension of new images."""
