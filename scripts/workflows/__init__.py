"""The graphs under workflows/: what they are made of (recipes), how they are laid out and written (graph)."""
