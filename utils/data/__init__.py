"""Images in: finding and listing, decoding, the cache on disk, batches, downloads of data sets.

All rooms and scripts may import from it.
"""
