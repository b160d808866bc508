"""What responses are worth by a function, a server, a judge or a rule."""
