/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The worker status table: what gunicorn's workers and the kernel program tell
 * each other. hermes_gunicorn/table.py declares the same layout; the loader
 * compares the two before it loads anything, and a test holds them against the
 * object's BTF.
 *
 * All words are native-endian, 8 bytes wide and naturally aligned, so that one
 * plain store publishes one value. Every word has one writer. The table is
 * writable by every worker: the program must stay safe and must find a socket
 * whatever the words hold.
 *
 * A slot is a place a worker can occupy: a row here, and in every socket array
 * a listener of its own. Slot 0 belongs to nobody: it stands for gunicorn's own
 * listener, which all workers share and which takes a connection that no healthy
 * worker can be found for.
 *
 * Worked example, three workers, the second one stuck in a C call for 0.3 s:
 *
 *   eligible[0] = 0b1110
 *   slot  state  busy_since_ns  requests  connections  dispatched - settled
 *   1     READY  0              0         7            0    in poll, idle
 *   2     READY  now - 0.3 s    1         7            2    hung: skipped
 *   3     READY  now - 80 us    2         6            0    serving two requests
 *
 * A new connection goes to slot 1: fewest requests and queued connections.
 */
#ifndef HERMES_H
#define HERMES_H

#define HERMES_LAYOUT_VERSION 1
#define HERMES_MAX_SLOTS 1024
#define HERMES_SLOTS_PER_GROUP 64
#define HERMES_MAX_GROUPS (HERMES_MAX_SLOTS / HERMES_SLOTS_PER_GROUP)
#define HERMES_SHARED_SLOT 0

/* A slot's life. Only a READY slot is sent connections. */
enum hermes_state {
	HERMES_FREE = 0, /* nobody's */
	HERMES_BOOTING = 1, /* has an owner that does not accept yet */
	HERMES_READY = 2, /* its owner accepts */
	HERMES_DRAINING = 3, /* its owner finishes what it has and leaves */
	HERMES_DEAD = 4, /* its owner has left and was not reaped yet */
};

/* What rules all binds. One element, written by the arbiter but for `eligible`. */
struct hermes_control {
	__u64 slots; /* slots in use, slot 0 included: 1 .. HERMES_MAX_SLOTS */
	__u64 hang_threshold_ns; /* busy for longer than this is hung; 0: never */
	__u64 reserved[6];
	/*
	 * Stage 1, bit s % 64 of word s / 64: slot s may be sent connections.
	 * Anyone may store a word, but only the value that follows from the rows.
	 * It is a short cut; `state` in the row has the last word.
	 */
	__u64 eligible[HERMES_MAX_GROUPS];
};

/* One slot's row: a cache line the worker writes, a cache line the kernel writes. */
struct hermes_worker {
	__u64 state; /* enum hermes_state; arbiter while it has no owner, then the worker */
	__u64 generation; /* owners so far; arbiter */
	__u64 busy_since_ns; /* CLOCK_MONOTONIC at which the loop woke with work; 0: in poll */
	__u64 requests; /* in flight, and the first one of each new connection */
	__u64 connections; /* open */
	__u64 capacity; /* requests it can run at once, at least 1 */
	__u64 settled; /* of `dispatched`: accepted, or written off as never completed */
	__u64 accepted; /* connections taken from its own listeners */

	__u64 dispatched; /* connections the kernel sent here */
	__u64 last_dispatch_ns; /* CLOCK_MONOTONIC of the last one */
	__u64 reserved[6];
};

/* Counters of one bind's program. One element, written by the kernel. */
struct hermes_bind {
	__u64 dispatched; /* connections given to a worker */
	__u64 hung_skipped; /* workers passed over because they were hung */
	__u64 none_eligible; /* no healthy worker: sent to the shared listener */
	__u64 select_failed; /* the chosen slot had no socket: shared listener */
	__u64 shared_failed; /* not even that: left to the kernel's hash */
	__u64 no_table; /* a map lookup failed: left to the kernel's hash */
	__u64 reserved[2];
};

/* What the object tells the loader about itself, in section "hermes.layout". */
struct hermes_layout {
	__u32 version; /* HERMES_LAYOUT_VERSION */
	__u32 control_size; /* sizeof(struct hermes_control), and so on */
	__u32 worker_size;
	__u32 bind_size;
};

#endif /* HERMES_H */
