"""Measurements of tetris against the best dense library on this machine and the sparse peers."""
