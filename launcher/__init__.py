"""From a recipe to running processes: the command line and the ways in (one process, a node, a cluster)."""
