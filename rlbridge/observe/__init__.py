"""What a person and a file are told of a run; reached through the lifecycle hooks alone."""
