"""SVG2 Fused Ops: which parts of a model's blocks it recognises, and what it puts in their place."""
