"""What a run is made of: the table of its stages, and each stage."""
