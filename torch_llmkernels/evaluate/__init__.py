"""Checking and timing candidates: what may be believed about a kernel, and how it is found out."""
