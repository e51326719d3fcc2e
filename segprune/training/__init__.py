"""Training and scoring. Saves nothing and prints nothing: what happens is handed to callbacks."""
