"""`python -m utils.evaluate`, a command: nothing but benchmarks, docs and tests imports from it."""
