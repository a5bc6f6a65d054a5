"""What a worker does in a step: attend, append, cut."""
