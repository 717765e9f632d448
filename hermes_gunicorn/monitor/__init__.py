"""The monitor: a process beside the arbiter that shows what the table says.

    launch.py    the arbiter's side: a socket to ask at, and the process when it is wanted
    address.py   the address of hermes_stats, which the arbiter opens and hands on
    process.py   the process: maps the table, samples it, answers
    watch.py     what it knows: a snapshot, events, the last minutes
    control.py   the socket of hermesctl: both ends, and who may use it
    answers.py   what is answered there, and how hermesctl checks that
    web.py       hermes_stats: the live page, /metrics, /stats.json

The process is there while ``hermes_stats`` is set, or for a minute after ``hermesctl`` asked.
It is a new interpreter with nothing of the arbiter's but the table's descriptors, so that
neither its threads nor its death concern the server.
"""
