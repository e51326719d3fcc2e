"""A run on disk: the folder of a training run, fitting with resume, and the records that are saved as JSON."""
