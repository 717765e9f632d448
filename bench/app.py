"""The application the benchmarks serve: a few bytes, no framework."""

BODY = b"hello, world\n"
HEADERS = [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))]


def app(environ, start_response):
    """Answer at once."""
    start_response("200 OK", HEADERS)
    return [BODY]
