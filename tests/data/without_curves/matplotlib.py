"""Stands before the real one in the processes that tests start: they draw no curves."""

raise ImportError("the tests draw no curves")
