// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * hermes_dispatch: picks the listener, and with it the worker, that gets a new
 * connection. The kernel runs it for every SYN to a port whose reuseport group it
 * is attached to, and, with BPF_SK_REUSEPORT_SELECT_OR_MIGRATE, for every waiting
 * connection of a listener that closes.
 *
 * Healthy is a worker that is eligible, allowed for this bind, ready, and not hung
 * by the kernel's own clock. Of those, policy least_loaded takes the one with the
 * lowest rank(), ties broken by the packet's hash; policy cascade takes one by hash
 * among those that userspace selected, and searches only when that one is unfit.
 * With no healthy worker the connection goes to the shared listener (slot 0), where
 * the first worker to come back takes it. hermes_gunicorn/core/policy.py is the model
 * this is tested against; docs/policies.md tells what each policy is for.
 *
 * Slots come in groups of 64, one bitmap word each. However many there are, two are
 * looked at: the cost per connection and the verifier's work stay bounded.
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

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HERMES_MAX_GROUPS);
	__type(key, __u32);
	__type(value, struct hermes_group);
} hermes_groups SEC(".maps");

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
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HERMES_MAX_GROUPS);
	__type(key, __u32);
	__type(value, struct hermes_allowed);
} hermes_allowed SEC(".maps");

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
	.group_size = sizeof(struct hermes_group),
	.allowed_size = sizeof(struct hermes_allowed),
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

/* Where IP headers keep their addresses (RFC 791, RFC 8200), and how ctx names IPv6. */
#define IPV4_SOURCE 12
#define IPV4_DESTINATION 16
#define IPV6_SOURCE 8
#define IPV6_DESTINATION 24
#define ETH_P_IPV6_NETWORK 0xdd86 /* big-endian 0x86dd as this machine reads it */

/*
 * rank(), from the top: 39 bits of load, one bit for busy, 24 bits of connections.
 * Honest values fit; others are cut, for any rank is safe.
 */
#define LOAD_SHIFT 25
#define REQUESTS_MASK ((1ULL << 19) - 1)
#define WEIGHT_MASK ((2ULL << HERMES_WEIGHT_SHIFT) - 1)
#define BUSY_SHIFT 24
#define CONNECTIONS_MASK ((1ULL << BUSY_SHIFT) - 1)

/* A group of 64 slots as this bind sees it. */
struct group {
	__u32 index;
	__u64 usable; /* bit i: slot 64 * index + i is eligible and allowed */
	__u64 selected; /* the same, and passed the filters of the cascade */
};

/* How a connection looks for its groups. */
struct search {
	__u32 groups; /* in use; at least 1 */
	__u32 localities;
	__u32 own; /* the connection's locality */
	__u32 members; /* groups of that locality; 0 if the table is too small for it */
	__u32 member; /* which of them the hash picks, from 0 */
	__u64 everybody; /* all ones if the bind allows nobody at all, else 0 */
};

/* The healthy workers of the lowest rank in a group. */
struct choice {
	__u32 group;
	__u64 lowest; /* their rank */
	__u64 ties; /* bit i: slot 64 * group + i is one of them */
	__u64 hung; /* how many were skipped as hung */
};

#define BYTES(byte) (0x0101010101010101ULL * (byte))

/* For each byte, its number of set bits and that of all bytes below. */
static __always_inline __u64 popcount_bytes(__u64 word)
{
	word -= (word >> 1) & BYTES(0x55);
	word = (word & BYTES(0x33)) + ((word >> 2) & BYTES(0x33));
	word = (word + (word >> 4)) & BYTES(0x0f);
	return word * BYTES(1);
}

static __always_inline __u32 popcount(__u64 word)
{
	return popcount_bytes(word) >> 56;
}

/* How many of the bytes are at most n, all below 128. */
static __always_inline __u32 bytes_up_to(__u64 bytes, __u64 n)
{
	return (((n * BYTES(1) | BYTES(0x80)) - bytes & BYTES(0x80)) >> 7) * BYTES(1) >> 56;
}

/*
 * Position of the n-th (from 0) set bit of word; n < popcount(word). First the byte,
 * then the bit within, without branches: which it is, nobody can predict. After
 * S. Vigna, Broadword Implementation of Rank/Select Queries, 2008.
 */
static __always_inline __u32 nth_set_bit(__u64 word, __u32 n)
{
	__u64 sums = popcount_bytes(word);
	__u32 shift = bytes_up_to(sums, n) * 8 & 63;
	__u64 bits;

	n -= sums << 8 >> shift & 0xff;
	/* One byte for each bit of the byte: 1 if it is set. */
	bits = (word >> shift & 0xff) * BYTES(1) & 0x8040201008040201ULL;
	bits = (bits + BYTES(0x7f) & BYTES(0x80)) >> 7;
	return shift + bytes_up_to(bits * BYTES(1), n);
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

/* 1 if any bit is set, without the branch that a compiler makes of !!word. */
static __always_inline __u64 is_set(__u64 word)
{
	word |= -word;
	asm volatile("" : "+r"(word));
	return word >> 63;
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
 * Busy for too long, or marked as frozen by a sibling. Never busy for too long: zero,
 * a worker in poll, which wraps to the largest value; and a time after now, as a
 * worker may have woken on another CPU since we read the clock.
 */
static __always_inline int is_hung(const struct hermes_worker *worker, __u64 busy_since,
				   __u64 limit)
{
	return busy_since - 1 < limit - 1 || READ_ONCE(worker->frozen_since_ns);
}

/*
 * Lower is better: requests in flight or queued, relative to capacity; then workers
 * in poll before busy ones; then fewest connections. No branches: the verifier walks
 * each way through the loop below once per slot.
 */
static __always_inline __u64 rank(const struct hermes_worker *worker, __u64 busy_since)
{
	__u64 queued = READ_ONCE(worker->dispatched) - READ_ONCE(worker->settled);
	__u64 busy = is_set(busy_since);
	__u64 load;

	/* Taken before it was booked, as with SYN cookies: negative, nothing queued. */
	queued &= ~((__s64)queued >> 63);
	load = (READ_ONCE(worker->requests) + queued) & REQUESTS_MASK;
	/* Published as a weight, because a division for each worker would show. */
	load *= READ_ONCE(worker->weight) & WEIGHT_MASK;
	return (load << LOAD_SHIFT) | (busy << BUSY_SHIFT) |
	       (READ_ONCE(worker->connections) & CONNECTIONS_MASK);
}

/* Find the healthy workers of the lowest rank in a group. */
static __always_inline struct choice least_loaded(const struct group *group, __u64 now, __u64 limit)
{
	struct choice choice = {
		.group = group->index,
		.lowest = opaque(~0ULL, now),
		.ties = opaque(0, now),
		.hung = opaque(0, now),
	};

	/* 64 copies of the body would be a program of 36 KB. */
	NO_UNROLL
	for (__u32 i = 0; i < HERMES_SLOTS_PER_GROUP; i++) {
		__u32 slot = group->index * HERMES_SLOTS_PER_GROUP + i;
		struct hermes_worker *worker;
		__u64 busy_since, worker_rank;

		if (!(group->usable >> i))
			break;
		if (!(group->usable >> i & 1))
			continue;
		worker = bpf_map_lookup_elem(MAP(hermes_workers), &slot);
		if (!worker || READ_ONCE(worker->state) != HERMES_READY)
			continue;
		busy_since = READ_ONCE(worker->busy_since_ns);
		if (is_hung(worker, busy_since, limit)) {
			choice.hung++;
			continue;
		}
		worker_rank = opaque(rank(worker, busy_since), now);
		if (worker_rank < choice.lowest) {
			choice.lowest = worker_rank;
			choice.ties = 0;
		}
		if (worker_rank == choice.lowest)
			choice.ties |= 1ULL << i;
	}
	choice.ties = opaque(choice.ties, now);
	return choice;
}

/* Spread the bits of a key (the finalizer of MurmurHash3, public domain). */
static __always_inline __u32 mix(__u32 key)
{
	key ^= key >> 16;
	key *= 0x85ebca6b;
	key ^= key >> 13;
	key *= 0xc2b2ae35;
	return key ^ key >> 16;
}

/*
 * The locality group of a connection: what belongs together has the same key, and
 * so the same workers. A migration has no packet to read an address from; it goes
 * by its hash.
 */
static __always_inline __u32 locality(struct sk_reuseport_md *ctx, struct hermes_bind *bind,
				      __u32 localities)
{
	__u64 by = READ_ONCE(bind->group_by);
	__u32 key = by == HERMES_BY_CLIENT ? 0 : READ_ONCE(bind->seed);
	__u32 address[4] = {};
	long error = 0;

	if (by == HERMES_BY_DESTINATION || by == HERMES_BY_CLIENT) {
		int client = by == HERMES_BY_CLIENT;

		if (ctx->eth_protocol == ETH_P_IPV6_NETWORK)
			error = bpf_skb_load_bytes_relative(ctx,
							    client ? IPV6_SOURCE : IPV6_DESTINATION,
							    address, 16, BPF_HDR_START_NET);
		else
			error = bpf_skb_load_bytes_relative(ctx,
							    client ? IPV4_SOURCE : IPV4_DESTINATION,
							    address, 4, BPF_HDR_START_NET);
	}
	if (error)
		return reciprocal_scale(ctx->hash, localities);
	UNROLL
	for (int i = 0; i < 4; i++)
		key = mix(key ^ address[i]);
	return reciprocal_scale(key, localities);
}

/*
 * All ones if no slot of the groups in use is allowed. The arbiter never decides that: the
 * words were overwritten, and until it restores them all workers may serve the bind.
 */
static __always_inline __u64 everybody(__u32 groups, __u64 now)
{
	__u64 any = 0, left = opaque(groups, now);

	NO_UNROLL
	for (__u32 i = 0; i < HERMES_MAX_GROUPS; i++) {
		__u32 index = opaque(i, now);
		struct hermes_allowed *allowed = bpf_map_lookup_elem(MAP(hermes_allowed), &index);

		if (!allowed)
			break;
		any = opaque(any | READ_ONCE(allowed->slots), now);
		left = opaque(left - 1, now);
		if (!left)
			break;
	}
	return opaque(is_set(any) - 1, now);
}

/* Say where a connection looks: in two groups of its locality, if there are two. */
static __always_inline struct search plan(struct sk_reuseport_md *ctx,
					  struct hermes_control *control, struct hermes_bind *bind,
					  __u64 now)
{
	struct search search = {
		.localities = READ_ONCE(control->localities),
		.own = opaque(0, now),
	};

	search.groups = (READ_ONCE(control->slots) - 1) / HERMES_SLOTS_PER_GROUP + 1;
	search.members = search.groups;
	if (search.localities > 1) {
		search.own = locality(ctx, bind, search.localities);
		search.members =
			(search.groups + search.localities - 1 - search.own) / search.localities;
	}
	search.member = reciprocal_scale(ctx->hash, search.members);
	search.everybody = everybody(search.groups, now);
	return search;
}

/*
 * The group at `index`, or if nobody in it may be sent this connection the next one
 * where somebody may.
 */
static __always_inline struct group group_from(__u32 index, const struct search *search, __u64 now)
{
	struct group group = {};

	NO_UNROLL
	for (__u32 i = 0; i < HERMES_MAX_GROUPS; i++) {
		struct hermes_group *stage_1;
		struct hermes_allowed *allowed;

		if (index >= search->groups)
			index = 0;
		index = opaque(index, now);
		stage_1 = bpf_map_lookup_elem(MAP(hermes_groups), &index);
		allowed = bpf_map_lookup_elem(MAP(hermes_allowed), &index);
		if (!stage_1 || !allowed)
			break;
		group.index = index;
		group.usable = READ_ONCE(stage_1->eligible) &
			       (READ_ONCE(allowed->slots) | search->everybody);
		group.selected = group.usable & READ_ONCE(stage_1->selected);
		if (group.usable)
			break;
		index++;
	}
	group.index = opaque(group.index, now);
	group.usable = opaque(group.usable, now);
	group.selected = opaque(group.selected, now);
	return group;
}

static __always_inline struct group first_group(const struct search *search, __u64 now)
{
	return group_from(search->own + search->member * search->localities, search, now);
}

/* Another group: of the same locality, or if there is none, the next one. */
static __always_inline struct group second_group(const struct search *search,
						 const struct group *first, __u32 hash, __u64 now)
{
	__u32 index = first->index + 1, member;

	if (search->members > 1) {
		member = search->member + 1 + reciprocal_scale(hash, search->members - 1);
		if (member >= search->members)
			member -= search->members;
		index = search->own + member * search->localities;
	}
	return group_from(index, search, now);
}

static __always_inline int is_own(const struct search *search, __u32 group)
{
	return search->localities <= 1 || group % search->localities == search->own;
}

/* Pick one of the set bits. */
static __always_inline __u32 pick(__u64 of, __u32 hash)
{
	return nth_set_bit(of, reciprocal_scale(hash, popcount(of)));
}

/*
 * The paper's Algorithm 2, the kernel's stage of the cascade: n = popcount(bitmap),
 * then reciprocal_scale(hash, n), then the n-th set bit. Two things are improved: a
 * lone survivor is picked, too, and the one that is picked must be fit by now; for
 * what userspace selected is a few milliseconds old.
 */
static __always_inline __u32 cascade(const struct group *group, __u32 hash, __u64 limit)
{
	__u32 slot = group->index * HERMES_SLOTS_PER_GROUP + pick(group->selected, hash);
	struct hermes_worker *worker;

	if (!group->selected)
		return HERMES_SHARED_SLOT;
	worker = bpf_map_lookup_elem(MAP(hermes_workers), &slot);
	if (!worker || READ_ONCE(worker->state) != HERMES_READY ||
	    is_hung(worker, READ_ONCE(worker->busy_since_ns), limit))
		return HERMES_SHARED_SLOT;
	return slot;
}

/* Choose a slot; HERMES_SHARED_SLOT when no healthy worker is to be found. */
static __always_inline __u32 choose(struct sk_reuseport_md *ctx, struct hermes_control *control,
				    struct hermes_bind *bind, __u64 now)
{
	__u64 limit = hang_limit(now, READ_ONCE(control->hang_threshold_ns));
	struct search search = plan(ctx, control, bind, now);
	struct group first = first_group(&search, now), second;
	/* Mixed, since the hash's high bits have chosen the group. */
	__u32 hash = ctx->hash * 0x9e3779b1, slot = HERMES_SHARED_SLOT;
	struct choice best, other;

	if (READ_ONCE(control->policy) == HERMES_CASCADE)
		slot = cascade(&first, hash, limit);
	if (slot == HERMES_SHARED_SLOT) {
		best = least_loaded(&first, now, limit);
		if (best.hung)
			add(bind, hung_skipped, best.hung);
		/* The better of two groups; one of another locality only in need. */
		if (search.groups > 1 && (search.members > 1 || !best.ties)) {
			second = second_group(&search, &first, mix(ctx->hash), now);
			other = least_loaded(&second, now, limit);
			if (other.hung)
				add(bind, hung_skipped, other.hung);
			/* On a tie the one that the hash chose first. */
			if (other.lowest < best.lowest)
				best = other;
		}
		if (!best.ties)
			return HERMES_SHARED_SLOT;
		slot = best.group * HERMES_SLOTS_PER_GROUP + pick(best.ties, hash);
	}
	if (!is_own(&search, slot / HERMES_SLOTS_PER_GROUP))
		count(bind, spilled);
	return slot;
}

/* Select the slot's socket. */
static __always_inline int select_slot(struct sk_reuseport_md *ctx, __u32 slot)
{
	return bpf_sk_select_reuseport(ctx, MAP(hermes_listeners), &slot, 0);
}

/* Book the connection to the slot. */
static __always_inline void book(struct sk_reuseport_md *ctx, __u32 slot, __u64 now)
{
	struct hermes_worker *worker = bpf_map_lookup_elem(MAP(hermes_workers), &slot);

	if (worker && opens_connection(ctx)) {
		count(worker, dispatched);
		WRITE_ONCE(worker->last_dispatch_ns, now);
	}
}

/*
 * Select any slot that has a socket, which is: an owner, whatever its state. During an
 * upgrade the shared listener is nobody's for a moment. The kernel's hash would also
 * choose listeners that were opened in advance, which nobody accepts from.
 */
static __always_inline __u32 select_any(struct sk_reuseport_md *ctx)
{
	__u32 slot;

	for (slot = 1; slot < HERMES_SLOTS_PER_GROUP; slot++) {
		if (!select_slot(ctx, slot))
			return slot;
	}
	return HERMES_SHARED_SLOT;
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

	slot = choose(ctx, control, bind, now);
	if (slot == HERMES_SHARED_SLOT) {
		count(bind, none_eligible);
	} else if (!select_slot(ctx, slot)) {
		count(bind, dispatched);
		book(ctx, slot, now);
		return SK_PASS;
	} else {
		count(bind, select_failed);
	}
	slot = HERMES_SHARED_SLOT;
	if (select_slot(ctx, slot)) {
		slot = select_any(ctx);
		if (slot == HERMES_SHARED_SLOT) {
			count(bind, shared_failed);
			return SK_PASS;
		}
	}
	book(ctx, slot, now);
	return SK_PASS;
}
