"""What is added to gunicorn's arbiter."""
