"""A small world of camera scenes, and the training of the model that ships with the code on it."""
