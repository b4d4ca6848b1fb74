"""What a run tells people: the live line in the node, and the report's pictures."""
