"""SVG2 on the GPUs of Raylight: what the node sends to its actors (actors.py), and what runs inside them (worker.py)."""
