"""Kernel files and the two targets that compile, load and launch them."""
