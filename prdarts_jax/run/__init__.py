"""A run of any kind: its loop, its workdir, its checkpoints and its logs."""
