"""Frames out of cameras and files."""
