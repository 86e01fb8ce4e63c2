"""One folder per recipe."""
