"""Top floor: the command line and the processes. Never imports mlx, numpy or zarr."""
