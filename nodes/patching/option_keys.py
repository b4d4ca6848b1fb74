"""What SVG2 puts into a model's transformer_options, by key."""

OVERRIDE = "optimized_attention_override"  # the host calls what is there with every attention call
RUN = "svg2_run"  # for the length of a sampling run
CALL = "svg2_call"  # for the length of a model evaluation
TOP = "svg2_top"  # for the length of a run: our override that stands above another node's
