"""`python -m utils.evaluate`: how good new images are. FID, KID, precision and recall, nearest images, bits per dimension."""
