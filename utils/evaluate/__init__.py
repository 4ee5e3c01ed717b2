"""`python -m utils.evaluate`: FID, KID, precision and recall, nearest images, bits per dimension.

A command: nothing but benchmarks and tests imports from it.
"""
