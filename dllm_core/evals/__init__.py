"""Quality and speed of any room, through the protocol alone."""
