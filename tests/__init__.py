"""Tiny, offline, on the CPU."""
