"""Images in: finding and listing, decoding, the cache on disk, batches, downloads of data sets."""
