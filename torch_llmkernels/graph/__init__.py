"""From FX graphs to regions, tasks and swapped graphs."""
