"""SVG2 hung on a model: the attention override, the run that holds its state, and where the video's tokens are."""
