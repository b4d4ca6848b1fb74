"""Pictures for SVG2Report and SVG2Compare, drawn with Pillow: matplotlib is not on users' machines."""
