"""Images in: the list, decoding, the cache on disk, batches, and data sets to download. Imports only the plain modules of utils."""
