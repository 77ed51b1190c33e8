"""Top floor: the command line and the processes. Never imports mlx, numpy or zarr."""

EXIT_DONE, EXIT_BAD_INPUT, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130
