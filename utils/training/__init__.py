"""Everything train.py needs beside its loop: resuming, files of a run, optimizer, randomness, validation, memory. No networks."""
