"""What the client and the server measured, made into a summary."""
