"""What SVG2 Doctor measures on a machine, and the record it makes of it."""
