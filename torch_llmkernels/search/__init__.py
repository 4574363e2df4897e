"""The branching search: ideas in words, several implementations of each, the best of them the next round's seeds."""
