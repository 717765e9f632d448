// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * hermes_dispatch: picks the listener, and with it the worker, that gets a new
 * connection. The kernel runs it for every SYN to a port whose reuseport group it
 * is attached to, and, with BPF_SK_REUSEPORT_SELECT_OR_MIGRATE, for every waiting
 * connection of a listener that closes.
 *
 * Among the eligible, ready workers that are not hung by the kernel's own clock
 * it takes the one with the lowest rank(); ties are broken by the packet's hash.
 * With no such worker the connection goes to the shared listener (slot 0), where
 * the first worker to come back takes it.
 *
 * One instance per bind address: the socket array must hold listeners of the
 * reuseport group the packet arrived at. All instances share control and workers.
 *
 * The same source serves clang (hermes.bpf.o, maps named by relocation) and BCC,
 * which defines HERMES_BCC and a pseudo fd for each map.
 */
#include <linux/bpf.h>
#include <linux/types.h>

#ifdef HERMES_BCC
#undef SEC
#define SEC(name)
#undef __always_inline
#define MAP(name) ((void *)bpf_pseudo_fd(1, name##_FD))
#define __always_inline inline __attribute__((always_inline))
#else
#include <bpf/bpf_helpers.h>
#define MAP(name) (&name)
#endif

#include "hermes.h"

#ifndef HERMES_BCC
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hermes_control);
} hermes_control SEC(".maps");

/* max_entries of this and of hermes_listeners: set by the loader. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HERMES_MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct hermes_worker);
} hermes_workers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct hermes_bind);
} hermes_bind SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, HERMES_MAX_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} hermes_listeners SEC(".maps");

const struct hermes_layout hermes_layout SEC("hermes.layout") = {
	.version = HERMES_LAYOUT_VERSION,
	.control_size = sizeof(struct hermes_control),
	.worker_size = sizeof(struct hermes_worker),
	.bind_size = sizeof(struct hermes_bind),
};

/* The clock helper is GPL-only on older kernels. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
#endif

/* One load or store of the word, neither torn nor repeated. */
#define READ_ONCE(x) (*(volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))

/*
 * The empty asm differs from counter to counter and so keeps the compiler from
 * merging two paths into one store with a computed address, which the verifier
 * forbids a user without CAP_PERFMON.
 */
#define add(object, counter, n)                                                                    \
	do {                                                                                       \
		__sync_fetch_and_add(&(object)->counter, n);                                       \
		asm volatile("" ::"i"(&((__typeof__(object))0)->counter));                         \
	} while (0)
#define count(object, counter) add(object, counter, 1)

/*
 * For loops over a fixed array: for a user without CAP_PERFMON the verifier also
 * walks what a CPU may do speculatively, and a counter that runs on past the end
 * then computes an address outside.
 */
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("nounroll")

/* Where a TCP header keeps its flags (RFC 9293, 3.1). */
#define TCP_HEADER_MIN 20
#define TCP_FLAGS_OFFSET 13
#define TCP_SYN 0x02
#define TCP_ACK 0x10

/*
 * rank(), from the top: 39 bits of load relative to capacity, one bit for busy, 24
 * bits of connections. Honest values fit; others are cut, for any rank is safe.
 */
#define LOAD_SHIFT 25
#define LOAD_FRACTION_SHIFT 20
#define LOAD_MASK ((1ULL << 19) - 1)
#define BUSY_SHIFT 24
#define CONNECTIONS_MASK ((1ULL << BUSY_SHIFT) - 1)

struct group {
	__u32 first; /* its first slot */
	__u64 eligible; /* bit i: slot first + i */
};

struct choice {
	__u64 ties; /* the group's slots of the lowest rank, as bits */
	__u64 hung; /* how many were skipped as hung */
};

static __always_inline __u32 popcount(__u64 word)
{
	word -= (word >> 1) & 0x5555555555555555ULL;
	word = (word & 0x3333333333333333ULL) + ((word >> 2) & 0x3333333333333333ULL);
	word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return (word * 0x0101010101010101ULL) >> 56;
}

/* Position of the n-th (from 0) set bit of word; n < popcount(word), else anything. */
static __always_inline __u32 nth_set_bit(__u64 word, __u32 n)
{
	__u32 position = 0;

	UNROLL
	for (__u32 width = 32; width; width >>= 1) {
		__u32 below = popcount(word & ((1ULL << width) - 1));

		if (n >= below) {
			n -= below;
			word >>= width;
			position += width;
		}
	}
	return position;
}

/* Map a 32-bit hash onto 0 .. n - 1 without a division (as the kernel does). */
static __always_inline __u32 reciprocal_scale(__u32 hash, __u32 n)
{
	return ((__u64)hash * n) >> 32;
}

/*
 * Is this a new connection? Without the migrating socket (5.14+) in reach, a
 * migration is told by its packet, which is empty or the handshake's last ACK.
 * Strays to a connection that is gone look like that ACK; they are not counted,
 * as nothing will be accepted for them.
 */
static __always_inline int opens_connection(struct sk_reuseport_md *ctx)
{
	__u8 *header = ctx->data;

	if ((void *)(header + TCP_HEADER_MIN) > ctx->data_end)
		return 1;
	return (header[TCP_FLAGS_OFFSET] & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/*
 * Hide a value from the verifier. It follows known constants through the loop below
 * and, where one decides a branch, keeps the states of all its values apart: 64
 * slots make more of them than it will walk. Unknown values are one state.
 */
static __always_inline __u64 opaque(__u64 value, __u64 unknown)
{
	value ^= unknown;
	asm volatile("" : "+r"(value));
	return value ^ unknown;
}

/* The clock of the oldest wake-up that is no hang; 1 if there is no limit. */
static __always_inline __u64 hang_limit(__u64 now, __u64 threshold)
{
	__u64 limit = threshold && threshold < now ? now - threshold : 1;

	return opaque(limit, now);
}

/*
 * Never hung: zero, a worker in poll, which wraps to the largest value; and a time
 * after now, as a worker may have woken on another CPU since we read the clock.
 */
static __always_inline int is_hung(__u64 busy_since, __u64 limit)
{
	return busy_since - 1 < limit - 1;
}

/*
 * Lower is better: requests in flight or queued, relative to capacity; then workers
 * in poll before busy ones; then fewest connections. No branches: the verifier walks
 * each way through the loop below once per slot.
 */
static __always_inline __u64 rank(const struct hermes_worker *worker, __u64 busy_since)
{
	__u64 queued = READ_ONCE(worker->dispatched) - READ_ONCE(worker->settled);
	__u64 busy = (busy_since | -busy_since) >> 63;
	__u64 load;

	/* Taken before it was booked, as with SYN cookies: negative, nothing queued. */
	queued &= ~((__s64)queued >> 63);
	load = (READ_ONCE(worker->requests) + queued) & LOAD_MASK;
	/* In eBPF a division by zero yields zero. */
	load = (load << LOAD_FRACTION_SHIFT) / READ_ONCE(worker->capacity);
	return (load << LOAD_SHIFT) | (busy << BUSY_SHIFT) |
	       (READ_ONCE(worker->connections) & CONNECTIONS_MASK);
}

/* Find the healthy workers of the lowest rank among the eligible of a group. */
static __always_inline struct choice least_loaded(__u32 first, __u64 eligible, __u64 now,
						  __u64 limit)
{
	struct choice choice = {
		.ties = opaque(0, now),
		.hung = opaque(0, now),
	};
	__u64 lowest = opaque(~0ULL, now);

	/* 64 copies of the body would be a program of 36 KB. */
	NO_UNROLL
	for (__u32 i = 0; i < HERMES_SLOTS_PER_GROUP; i++) {
		__u32 slot = first + i;
		struct hermes_worker *worker;
		__u64 busy_since, worker_rank;

		if (!(eligible >> i))
			break;
		if (!(eligible >> i & 1))
			continue;
		worker = bpf_map_lookup_elem(MAP(hermes_workers), &slot);
		if (!worker || READ_ONCE(worker->state) != HERMES_READY)
			continue;
		busy_since = READ_ONCE(worker->busy_since_ns);
		if (is_hung(busy_since, limit)) {
			choice.hung++;
			continue;
		}
		worker_rank = opaque(rank(worker, busy_since), now);
		if (worker_rank < lowest) {
			lowest = worker_rank;
			choice.ties = 0;
		}
		if (worker_rank == lowest)
			choice.ties |= 1ULL << i;
	}
	choice.ties = opaque(choice.ties, now);
	return choice;
}

/*
 * The hash picks one of the groups with eligible workers. Exactly one is searched,
 * whatever their number: that bounds the cost, and the verifier's work, too.
 */
static __always_inline struct group choose_group(struct hermes_control *control, __u32 hash,
						 __u64 now)
{
	struct group group = {};
	__u64 groups = opaque(0, now);
	__u32 chosen;

	if (READ_ONCE(control->slots) <= HERMES_SLOTS_PER_GROUP) {
		group.eligible = READ_ONCE(control->eligible[0]);
		return group;
	}
	UNROLL
	for (__u32 i = 0; i < HERMES_MAX_GROUPS; i++)
		groups |= (__u64) !!READ_ONCE(control->eligible[i]) << i;
	groups = opaque(groups, now);
	chosen = nth_set_bit(groups, reciprocal_scale(hash, popcount(groups)));

	/*
	 * Not control->eligible[chosen]: without CAP_PERFMON a computed address makes
	 * the verifier keep all scalars apart, and then it does not finish.
	 */
	UNROLL
	for (__u32 i = 0; i < HERMES_MAX_GROUPS; i++) {
		if (i != chosen)
			continue;
		group.first = i * HERMES_SLOTS_PER_GROUP;
		group.eligible = READ_ONCE(control->eligible[i]);
	}
	return group;
}

/* Choose a slot; HERMES_SHARED_SLOT when no healthy worker is to be found. */
static __always_inline __u32 choose(struct hermes_control *control, struct hermes_bind *bind,
				    __u32 hash, __u64 now)
{
	struct group group = choose_group(control, hash, now);
	__u32 first = opaque(group.first, now);
	struct choice choice = least_loaded(first, opaque(group.eligible, now), now,
					    hang_limit(now, READ_ONCE(control->hang_threshold_ns)));

	if (choice.hung)
		add(bind, hung_skipped, choice.hung);
	if (!choice.ties)
		return HERMES_SHARED_SLOT;
	/* Mixed, since the hash's high bits may have chosen the group. */
	return first +
	       nth_set_bit(choice.ties, reciprocal_scale(hash * 0x9e3779b1, popcount(choice.ties)));
}

/* Select the slot's socket and book the connection to it. */
static __always_inline int select_slot(struct sk_reuseport_md *ctx, __u32 slot, __u64 now)
{
	struct hermes_worker *worker;
	int error = bpf_sk_select_reuseport(ctx, MAP(hermes_listeners), &slot, 0);

	if (error || !opens_connection(ctx))
		return error;
	worker = bpf_map_lookup_elem(MAP(hermes_workers), &slot);
	if (worker) {
		count(worker, dispatched);
		WRITE_ONCE(worker->last_dispatch_ns, now);
	}
	return 0;
}

SEC("sk_reuseport/migrate")
int hermes_dispatch(struct sk_reuseport_md *ctx)
{
	__u32 zero = 0;
	struct hermes_bind *bind = bpf_map_lookup_elem(MAP(hermes_bind), &zero);
	struct hermes_control *control = bpf_map_lookup_elem(MAP(hermes_control), &zero);
	__u64 now = bpf_ktime_get_ns();
	__u32 slot;

	/* SK_PASS without a selection leaves the choice to the kernel's hash. */
	if (!bind)
		return SK_PASS;
	if (!control) {
		count(bind, no_table);
		return SK_PASS;
	}

	slot = choose(control, bind, ctx->hash, now);
	if (slot == HERMES_SHARED_SLOT) {
		count(bind, none_eligible);
	} else if (!select_slot(ctx, slot, now)) {
		count(bind, dispatched);
		return SK_PASS;
	} else {
		count(bind, select_failed);
	}
	if (select_slot(ctx, HERMES_SHARED_SLOT, now))
		count(bind, shared_failed);
	return SK_PASS;
}
