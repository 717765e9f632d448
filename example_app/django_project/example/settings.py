"""As few settings as an honest Django project without a database has."""

import os

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "for the example only")
DEBUG = False
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
ROOT_URLCONF = "example.urls"
WSGI_APPLICATION = "example.wsgi.application"
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
USE_TZ = True
TIME_ZONE = "UTC"  # Django sets TZ from it: the default moves the log to Chicago
