"""`segprune train`: its flags, the command, and a run as it is watched."""
