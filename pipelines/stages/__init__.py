"""The six stages of a run, one file each."""
