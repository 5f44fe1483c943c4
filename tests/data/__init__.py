"""Data against the world: every file under ../shared/data, and what other tools make of the same rows."""
