"""What a run will do, need and take, before a GPU is touched."""
