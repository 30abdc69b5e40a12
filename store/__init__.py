"""What was seen, and how to find it again."""
