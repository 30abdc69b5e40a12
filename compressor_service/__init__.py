"""Frames to one vision token each."""
