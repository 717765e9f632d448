"""The example as a Django project."""
