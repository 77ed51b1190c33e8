"""One file is one model, in MLX alone; modules carry the names of the checkpoint's own keys."""
