"""How a bind address's connections reach the workers."""
