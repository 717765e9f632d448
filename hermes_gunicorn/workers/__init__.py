"""One thin module per gunicorn worker class, and the mixin they share."""
