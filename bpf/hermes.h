/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The worker status table: what gunicorn's workers and the kernel program tell
 * each other. hermes_gunicorn/core/layout.py declares the same layout; the loader
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

#define HERMES_LAYOUT_VERSION 4
#define HERMES_MAX_SLOTS 1024
#define HERMES_SLOTS_PER_GROUP 64
#define HERMES_MAX_GROUPS (HERMES_MAX_SLOTS / HERMES_SLOTS_PER_GROUP)
#define HERMES_SHARED_SLOT 0
#define HERMES_WEIGHT_SHIFT 20 /* a request that fills a worker weighs 1 << this */

/* A slot's life. Only a READY slot is sent connections. */
enum hermes_state {
	HERMES_FREE = 0, /* nobody's */
	HERMES_BOOTING = 1, /* has an owner that does not accept yet */
	HERMES_READY = 2, /* its owner accepts */
	HERMES_DRAINING = 3, /* its owner finishes what it has and leaves */
	HERMES_DEAD = 4, /* its owner has left and was not reaped yet */
};

enum hermes_policy {
	HERMES_LEAST_LOADED = 0,
	HERMES_CASCADE = 1,
};

/* What of a connection decides its locality group. */
enum hermes_group_by {
	HERMES_BY_BIND = 0,
	HERMES_BY_DESTINATION = 1,
	HERMES_BY_CLIENT = 2,
};

/*
 * What rules all binds. One element. Written by the arbiter, and by whoever tunes a
 * running server.
 */
struct hermes_control {
	__u64 slots; /* slots in use, slot 0 included: 1 .. HERMES_MAX_SLOTS */
	__u64 hang_threshold_ns; /* busy for longer than this is hung; 0: never */
	__u64 policy; /* enum hermes_policy */
	__u64 theta; /* cascade: slack above the average, in thousandths of it */
	__u64 localities; /* locality groups, 1: none; group g of 64 belongs to g % localities */
	__u64 scheduled_ns; /* CLOCK_MONOTONIC of stage 1's last run; any worker */
	__u64 look_at_ns; /* CLOCK_MONOTONIC at which siblings' queues are to be looked at; any worker */
	__u64 closing_since_ns; /* CLOCK_MONOTONIC at which responses first closed their connections; any worker */
};

/*
 * Stage 1 for a group of 64 slots, bit i for its i-th. Anyone may store a word, but
 * only the value that follows from the rows.
 */
struct hermes_group {
	__u64 eligible; /* may be sent connections; a short cut, `state` has the last word */
	__u64 selected; /* passed the filters of the cascade */
};

/* One slot's row: a cache line the worker writes, one the kernel writes at each dispatch. */
struct hermes_worker {
	__u64 state; /* enum hermes_state; arbiter while it has no owner, then the worker */
	__u64 busy_since_ns; /* CLOCK_MONOTONIC at which the loop woke with work; 0: in poll */
	__u64 requests; /* in flight, and the first one of each new connection */
	__u64 connections; /* open */
	__u64 weight; /* of one request: (1 << HERMES_WEIGHT_SHIFT) / capacity */
	__u64 settled; /* of `dispatched`: accepted, or written off as never completed */
	__u64 accepted; /* connections taken from its own listeners */
	__u64 frozen_since_ns; /* a sibling saw connections wait while it was in poll; 0: it turned */

	__u64 dispatched; /* connections the kernel sent here */
	__u64 last_dispatch_ns; /* CLOCK_MONOTONIC of the last one */
	/* Written seldom. */
	__u64 generation; /* owners so far; arbiter */
	__u64 capacity; /* requests it can run at once, at least 1; for people */
	__u64 rescued; /* connections it took from its siblings' listeners */
	__u64 rescued_at_ns; /* CLOCK_MONOTONIC at which siblings took what waited here; any sibling */
	__u64 pid; /* of the owner, in its PID namespace; for people */
	__u64 drained; /* 1: to be sent nothing more; whoever runs the server */
};

/* One bind address: counters by its program, then what the arbiter says about it. */
struct hermes_bind {
	__u64 dispatched; /* connections given to a worker */
	__u64 hung_skipped; /* workers passed over because they were hung */
	__u64 none_eligible; /* no healthy worker: sent to the shared listener */
	__u64 select_failed; /* the chosen slot had no socket: shared listener */
	__u64 shared_failed; /* not even that, nor any other: left to the kernel's hash */
	__u64 no_table; /* a map lookup failed: left to the kernel's hash */
	__u64 spilled; /* of `dispatched`: to another locality group than its own */
	__u64 reserved;

	__u64 group_by; /* enum hermes_group_by */
	__u64 seed; /* a hash of the address, so that binds differ in their groups */
	__u64 reserved2[6];
};

/* Which slots of a group of 64 may serve a bind address. None at all means every one. */
struct hermes_allowed {
	__u64 slots; /* bit i: the group's i-th */
};

/* What the object tells the loader about itself, in section "hermes.layout". */
struct hermes_layout {
	__u32 version; /* HERMES_LAYOUT_VERSION */
	__u32 control_size; /* sizeof(struct hermes_control), and so on */
	__u32 worker_size;
	__u32 bind_size;
	__u32 group_size;
	__u32 allowed_size;
};

#endif /* HERMES_H */
