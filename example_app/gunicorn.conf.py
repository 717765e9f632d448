# Used by both examples; `gunicorn` reads ./gunicorn.conf.py by itself, see README.md.

# The gevent worker, with connections dispatched by the kernel.
worker_class = "hermes"

# As many as with any other worker class: two or more for each core.
workers = 4

# Requests that one worker may have open at a time, on each address.
worker_connections = 1000

# A comma-separated list or several entries; each TCP address is dispatched to.
bind = ["127.0.0.1:8000"]

# --- What Hermes adds, with its defaults ---

# Who gives connections out: "kernel", "shared" (the workers among themselves), or "auto"
# (for each address the first that works). A Unix socket is always shared.
# hermes_mode = "auto"

# Where the kernel program comes from: "object" (prebuilt), "bcc" (compiled at start by
# the system's BCC), or "auto" (the first that works).
# hermes_loader = "auto"

# True: refuse to start where an address cannot be dispatched by the kernel (a Unix
# socket, no CAP_BPF). False: serve it in shared mode.
# hermes_strict = False

# A worker whose loop has not turned for so many seconds gets no new connections until
# it does; 0 switches that off.
# hermes_hang_threshold = 0.01

# What waits for a worker that is busy for so many seconds is taken by others that have
# less to do.
# hermes_rescue_after = 0.005

# Whether connections are kept while requests hold their workers for long: "auto" closes
# them then, so that the next request can go to a worker that is free; or "always".
# hermes_keepalive = "auto"
