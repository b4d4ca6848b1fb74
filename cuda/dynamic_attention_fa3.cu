// Dynamic-block attention in the manner of FlashAttention-3, for compute capability 9.0. The contract is
// svg2_core/ops/dynamic_attention/__init__.py; the launcher, cuda_fa3.py beside it, says what each field holds.
//
// Programs stay, and take one tile of query rows of one query cluster after another, longest first. The first warpgroup
// of a program gathers keys and values into a ring of buffers; two others multiply. A tile of up to 128 rows is halved:
// each consumer has 64 rows and sees all keys. A tile of up to 64 rows is not: each consumer has all rows and every
// other tile of keys, and their sums are added in the end. Keys come in tiles of KEYS: first those of the selected key
// clusters, packed one after another (plan.cuh lays them out), then text, then one virtual key for each cluster that
// was not selected.
#ifdef SVG2_EMULATOR
#include "warpgroup.h"
#else
#include "warpgroup.cuh"
#endif
#include "plan.cuh"

enum { KEYS = 128, HALF = 64, WARPGROUP = 128, THREADS = 3 * WARPGROUP, BOTH = 2 * WARPGROUP };
enum { SLOTS = 32 };         // that a warp of the producer looks up: one of each lane
enum { COPIES_AHEAD = 2 };   // parts whose copies may be under way behind the latest one
// The register file has 65,536; at launch a thread gets 168, and the sum may not grow.
enum { PRODUCER_REGISTERS = 88, CONSUMER_REGISTERS = 208 };
enum Name { TURN_OF_FIRST = 1, TURN_OF_SECOND, QUERIES_READ, SUMS_WRITTEN, PRODUCER };  // 0 is everybody's
static const int NONE = 0x7fffffff;

struct Params {
    const u16 *q, *k, *v;
    u16* out;
    const int *q_order, *k_order, *k_offsets;
    const signed char* block_map;
    int *ids, *ends, *shifts, *first_rank, *n_selected, *n_filled, *n_keys;
    const int* items;                        // [n_items][4]: row of (batch, head), query cluster, first place, rows
    int* next;                               // the item that is taken next
    const float* text_bias;                  // in units of the products: divided by the scale; 0 for none
    const u16 *tail_keys, *tail_values;      // 0 for no tail
    const float* tail_biases;                // likewise
    i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n;
    float scale;                             // of the products, log2(e) included
    int heads, n_video, video_start, n_text, c_q, c_k;
    int tiles;                               // of SLOTS slots: places of a query cluster in first_rank
    int n_items;
};

KERNEL void svg2_plan(PARAMETER Params p) {
    SHARED_MEMORY;
    plan<SLOTS>(p, smem);
}

// A matrix in shared memory as matrix instructions take it: rows of 128 bytes whose 16-byte chunks are exchanged by the
// last three bits of the row (128-byte swizzle), eight rows 1024 bytes apart from the next eight. panel: bytes from 64
// columns to the next 64; counts where the columns are the dimension that is not summed over.
DEVICE u64 matrix(u32 start, u32 panel) {
    return (u64)(start >> 4 & 0x3fff) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

enum Kind { SELECTED, TEXT, VIRTUAL, NO_TILE };

template <class T, int D>
struct Program {
    // A matrix of 128 rows lies in panels of 64 columns: rows of 128 bytes, swizzled. A part is the keys or the values
    // of a tile; the ring holds PARTS of them. Keys and values alternate, so keys have the even buffers.
    enum { CHUNKS = D / 8, PANEL = 128 * 128, PART = D / 64 * PANEL, PARTS = 768 / D };
    enum {
        RING = PART, BIASES = RING + PARTS * PART, SUMS = BIASES + PARTS / 2 * KEYS * 4, HEADER = SUMS + WARPGROUP * 4,
        ITEMS = HEADER + 32, BARRIERS = ITEMS + 2 * 16, SHARED = BARRIERS + (2 * PARTS + 2) * 8
    };

    const Params& p;
    u32 base;  // of shared memory; the queries come first
    int lane, warp;
    u32 part;  // the number of the item's first part, of all that went through the ring

    DEVICE_METHOD u32 full(u32 n) { return base + BARRIERS + n % PARTS * 8; }
    DEVICE_METHOD u32 free(u32 n) { return base + BARRIERS + (PARTS + n % PARTS) * 8; }
    DEVICE_METHOD u32 queries_full() { return base + BARRIERS + 2 * PARTS * 8; }
    DEVICE_METHOD u32 queries_free() { return queries_full() + 8; }
    DEVICE_METHOD int parity(u32 n) { return n / PARTS & 1; }
    DEVICE_METHOD u32 buffer(u32 n) { return base + RING + n % PARTS * PART; }
    DEVICE_METHOD u32 biases(u32 n) { return base + BIASES + n % PARTS / 2 * (KEYS * 4); }

    DEVICE_METHOD void run() {
        lane = thread() & 31, warp = warp_index(), part = 0;
        if (thread() == 0) {
            // Arrivals are of warps.
            for (int i = 0; i < PARTS; i++) barrier_init(full(i), 4), barrier_init(free(i), 8);
            barrier_init(queries_full(), 4), barrier_init(queries_free(), 8);
        }
        sync_block();
        if (warp < 4) produce();
        else consume();
    }

    // The producer. What follows is of the item that it works on.

    int row, at, rows, begin, selected, filled, keys, key_tiles, text_tiles, tiles;
    u32 waiting[COPIES_AHEAD];  // the barriers of parts whose copies are under way, oldest first; 0 for none

    DEVICE_METHOD void produce() {
        give_registers<PRODUCER_REGISTERS>();
        UNROLL for (int i = 0; i < COPIES_AHEAD; i++) waiting[i] = 0;
        int upcoming = 0;
        if (thread() == 0) upcoming = take_next(p.next);
        for (int turn = 0;; turn++) {
            learn_item(turn, upcoming);
            if (thread() == 0 && rows > 0) upcoming = take_next(p.next);  // known by the time it is asked for
            gather(turn);
            if (rows == 0) break;  // the consumers learn it in the same way
        }
        flush();
    }

    // The first warp reads which item is next; all four learn it. After the last one comes an item without rows.
    DEVICE_METHOD void learn_item(int turn, int upcoming) {
        const u32 place = base + ITEMS + (turn & 1) * 16;
        int field = 0;
        if (warp == 0) {
            const int item = shuffle(upcoming, 0);
            if (item < p.n_items && lane < 4) field = p.items[(i64)item * 4 + lane];
        }
        flush();  // consumers may wait for these
        if (warp == 0 && lane < 4) store_shared(place + lane * 4, field);
        named_wait(PRODUCER, WARPGROUP);
        row = load_shared_int(place), at = row * p.c_q + load_shared_int(place + 4);
        begin = load_shared_int(place + 8), rows = load_shared_int(place + 12);
        selected = filled = keys = 0;
        if (rows > 0) selected = p.n_selected[at], filled = p.n_filled[at], keys = p.n_keys[at];
        key_tiles = (keys + KEYS - 1) / KEYS, text_tiles = rows > 0 ? (p.n_text + KEYS - 1) / KEYS : 0;
        tiles = key_tiles + text_tiles + (p.tail_keys ? (filled - selected + KEYS - 1) / KEYS : 0);
    }

    enum Matrix { OF_KEYS, OF_VALUES, OF_QUERIES };

    DEVICE_METHOD void gather(int turn) {
        const int read = rows > HALF ? 2 * HALF : rows > 0 ? HALF : 0;  // rows that the consumers read
        int query = -1;
        if (warp * SLOTS + lane < rows) query = p.q_order[(i64)row * p.n_video + begin + warp * SLOTS + lane];
        // Four loads lie between a slot and its row, each taking its address from the last: they run ahead of the
        // copies, a step per tile.
        float bias, next_bias;
        int found = row_of(0, look_at_cluster(0, look_at_ends(0, look_at_rank(0))), bias);
        int cluster = look_at_cluster(1, look_at_ends(1, look_at_rank(1)));
        Ends ends = look_at_ends(2, look_at_rank(2));
        int rank = look_at_rank(3);
        NOT_UNROLLED for (int t = 0; t == 0 || t < tiles; t++) {
            const int next_found = row_of(t + 1, cluster, next_bias);
            cluster = look_at_cluster(t + 2, ends);
            ends = look_at_ends(t + 3, rank);
            rank = look_at_rank(t + 4);
            // The queries follow the first tile: its buffers may be free before theirs is.
            NOT_UNROLLED for (int m = tiles > 0 ? OF_KEYS : OF_QUERIES; m <= (t > 0 ? OF_VALUES : OF_QUERIES); m++) {
                if (m == OF_QUERIES) {
                    wait_for(queries_free(), (turn & 1) ^ 1);
                    if (thread() == 0) {
                        store_shared(base + HEADER, rows), store_shared(base + HEADER + 4, begin);
                        store_shared(base + HEADER + 8, row), store_shared(base + HEADER + 12, tiles);
                        store_shared(base + HEADER + 16, keys / KEYS);
                    }
                } else {
                    wait_for(free(part), parity(part) ^ 1);
                    if (m == OF_KEYS && t >= keys / KEYS) store_shared(biases(part) + (warp * SLOTS + lane) * 4, bias);
                }
                if (m != OF_QUERIES || warp * SLOTS < read) copy_rows(m, kind_of(t), m == OF_QUERIES ? query : found);
                submit(m == OF_QUERIES ? queries_full() : full(part++));
            }
            found = next_found, bias = next_bias;
        }
    }

    DEVICE_METHOD Kind kind_of(int t) {
        return t < key_tiles ? SELECTED : t < key_tiles + text_tiles ? TEXT : t < tiles ? VIRTUAL : NO_TILE;
    }
    // Of this lane, and of the first lane of its warp.
    DEVICE_METHOD int slot_of(int t) { return t * KEYS + warp * SLOTS + lane; }
    DEVICE_METHOD int first_slot_of(int t) { return t * KEYS + warp * SLOTS; }

    // The ends of up to 32 clusters from rank `first` on, of which this lane holds one.
    struct Ends {
        int first, end;
    };

    DEVICE_METHOD int look_at_rank(int t) {
        return first_slot_of(t) < keys ? p.first_rank[(i64)at * p.tiles + first_slot_of(t) / SLOTS] : 0;
    }

    DEVICE_METHOD Ends look_at_ends(int t, int first) {
        Ends e = {first, NONE};
        if (first_slot_of(t) < keys && first + lane < selected) e.end = p.ends[(i64)at * p.c_k + first + lane];
        return e;
    }

    // For a selected key what leads from its slot to its place in the key order, for a virtual key its cluster.
    DEVICE_METHOD int look_at_cluster(int t, Ends e) {
        // As many clusters lie before the slot as end at or before it: at most 31 of those in hand, for none is empty.
        int before = 0;
        UNROLL for (int step = 16; step > 0; step >>= 1)
            if (shuffle(e.end, before + step - 1) <= slot_of(t)) before += step;
        if (kind_of(t) == SELECTED) return slot_of(t) < keys ? p.shifts[(i64)at * p.c_k + e.first + before] : 0;
        const int rank = selected + slot_of(t - key_tiles - text_tiles);
        return kind_of(t) == VIRTUAL && rank < filled ? p.ids[(i64)at * p.c_k + rank] : -1;
    }

    // The row of keys and values, counted from the first video token for a selected key, and the bias of its logits.
    DEVICE_METHOD int row_of(int t, int cluster, float& bias) {
        const Kind kind = kind_of(t);
        bias = -__int_as_float(0x7f800000);
        if (kind == SELECTED) {
            if (slot_of(t) >= keys) return -1;
            bias = 0.0f;
            return p.k_order[(i64)row * p.n_video + slot_of(t) + cluster];
        }
        if (kind == TEXT) {
            const int slot = slot_of(t - key_tiles);
            if (slot >= p.n_text) return -1;
            bias = p.text_bias ? p.text_bias[(i64)(row / p.heads) * p.n_text + slot] : 0.0f;
            return slot < p.video_start ? slot : slot + p.n_video;
        }
        if (kind == VIRTUAL && cluster >= 0) bias = p.tail_biases[(i64)row * p.c_k + cluster];
        return kind == VIRTUAL ? cluster : -1;
    }

    // Copy the warp's 32 rows of a matrix; `found` is this lane's, less than 0 for zeros. Several lanes share a row.
    DEVICE_METHOD void copy_rows(int m, Kind kind, int found) {
        enum { AT_ONCE = 32 / CHUNKS, COPIES = 4 };
        const int c = lane % CHUNKS, r = lane / CHUNKS;
        const i64 batch = row / p.heads, head = row % p.heads;
        const u16* from;
        i64 stride;
        if (m == OF_QUERIES) from = p.q + batch * p.q_b + head * p.q_h, stride = p.q_n;
        else if (kind == VIRTUAL)
            from = (m == OF_KEYS ? p.tail_keys : p.tail_values) + (i64)row * p.c_k * D, stride = D;
        else if (m == OF_KEYS) from = p.k + batch * p.k_b + head * p.k_h, stride = p.k_n;
        else from = p.v + batch * p.v_b + head * p.v_h, stride = p.v_n;
        from += c * 8;
        if (m == OF_QUERIES || kind == SELECTED) from += p.video_start * stride;  // their rows are counted from there
        const u32 to = m == OF_QUERIES ? base : buffer(part);
        const u32 place = to + c / 8 * PANEL + (warp * SLOTS + r) * 128 + ((c & 7) ^ r) * 16;
        NOT_UNROLLED for (int i = 0; i < 32; i += COPIES * AT_ONCE)
            UNROLL for (int j = 0; j < COPIES * AT_ONCE; j += AT_ONCE) {
                const int token = shuffle(found, i + j + r);
                const u16* row_at = from + (token < 0 ? 0 : token) * stride;
                // i + j and r have no bits in common, and a panel is a multiple of 1024 bytes: one operation swizzles.
                copy16((place ^ ((i + j & 7) << 4)) + (i + j) * 128, row_at, token >= 0);
            }
    }

    // The copies so far are what `barrier` stands for. It is told when they have come, which is found out some parts
    // later.
    DEVICE_METHOD void submit(u32 barrier) {
        copies_end();
        if (waiting[0]) {
            copies_wait_but<COPIES_AHEAD>();
            tell(waiting[0]);
        }
        UNROLL for (int i = 0; i + 1 < COPIES_AHEAD; i++) waiting[i] = waiting[i + 1];
        waiting[COPIES_AHEAD - 1] = barrier;
    }

    // Copies are ordinary writes, matrix instructions read by another path: each lane has to fence its own.
    DEVICE_METHOD void tell(u32 barrier) {
        fence_for_matrices();
        sync_warp();
        if (lane == 0) barrier_arrive(barrier);
    }

    DEVICE_METHOD void flush() {
        copies_wait_but<0>();
        UNROLL for (int i = 0; i < COPIES_AHEAD; i++) {
            if (waiting[i]) tell(waiting[i]);
            waiting[i] = 0;
        }
    }

    // Before this warp waits for the consumers, they get what they may be waiting for.
    DEVICE_METHOD void wait_for(u32 barrier, int phase) {
        if (!shuffle(barrier_passed(barrier, phase), 0)) flush();
        barrier_wait(barrier, phase);
    }

    // The consumers.

    DEVICE_METHOD void consume() {
        take_registers<CONSUMER_REGISTERS>();
        const int second = warp >= 8;
        const int my_turn = second ? TURN_OF_SECOND : TURN_OF_FIRST;
        const int others_turn = second ? TURN_OF_FIRST : TURN_OF_SECOND;
        if (second) named_arrive(others_turn, BOTH);
        for (int turn = 0;; turn++) {
            barrier_wait(queries_full(), turn & 1);
            if (load_shared_int(base + HEADER) == 0) break;
            attend(second, my_turn, others_turn);
        }
        if (!second) named_wait(my_turn, BOTH);  // the turn that nobody takes
    }

    DEVICE_METHOD void release(u32 barrier, bool twice) {
        sync_warp();
        if (lane == 0) {
            barrier_arrive(barrier);
            if (twice) barrier_arrive(barrier);  // for the consumer that does not read it
        }
    }

    DEVICE_METHOD void attend(int second, int my_turn, int others_turn) {
        const int rows = load_shared_int(base + HEADER), begin = load_shared_int(base + HEADER + 4);
        const int row = load_shared_int(base + HEADER + 8), tiles = load_shared_int(base + HEADER + 12);
        const int plain = load_shared_int(base + HEADER + 16);  // tiles whose slots are all keys without a bias
        const bool low = rows <= HALF;
        const int first = low ? second : 0, step = low ? 2 : 1;
        const int own = (tiles - first + step - 1) / step;
        const u32 queries = base + (low ? 0 : second * HALF * 128);

        float acc[D / 8][4], logits[KEYS / 8][4], peak[2], total[2], fade[2];
        u32 weights[KEYS / 16][4];
        UNROLL for (int n = 0; n < D / 8; n++) UNROLL for (int j = 0; j < 4; j++) acc[n][j] = 0.0f;
        // The peak is finite: a masked tile must not make NaN.
        UNROLL for (int i = 0; i < 2; i++) peak[i] = -1e30f, total[i] = 0.0f;

        if (own > 0) {
            u32 n = part + 2 * first;  // the keys' part; the values are the next
            barrier_wait(full(n), parity(n));
            named_wait(my_turn, BOTH);
            matrices_begin();
            products(logits, queries, n);
            named_arrive(others_turn, BOTH);
            matrices_wait<0>(logits);
            softmax(logits, peak, total, fade, n, first < plain);
            release(free(n), low);
            round(weights, logits);
            NOT_UNROLLED for (int t = first + step; t < tiles; t += step) {
                const u32 last = n + 1;
                n += 2 * step;
                barrier_wait(full(n), parity(n)), barrier_wait(full(last), parity(last));
                named_wait(my_turn, BOTH);
                matrices_begin();
                products(logits, queries, n);
                weighted(acc, weights, last);
                named_arrive(others_turn, BOTH);
                matrices_wait<1>(logits);
                softmax(logits, peak, total, fade, n, t < plain);
                release(free(n), low);
                matrices_wait<0>(acc);
                release(free(last), low);
                if (any_in_warp(fade[0] != 1.0f || fade[1] != 1.0f))  // seldom, after the first few tiles
                    UNROLL for (int i = 0; i < D / 8; i++) UNROLL for (int j = 0; j < 4; j++) acc[i][j] *= fade[j / 2];
                round(weights, logits);
            }
            if (!low) release(queries_free(), false);
            barrier_wait(full(n + 1), parity(n + 1));
            matrices_begin();
            weighted(acc, weights, n + 1);
            matrices_wait<0>(acc);
            release(free(n + 1), low);
        } else if (!low) {
            release(queries_free(), false);
        }
        if (low && own < (tiles + 1) / 2) {  // the other consumer has one tile more, and so a turn
            named_wait(my_turn, BOTH);
            named_arrive(others_turn, BOTH);
        }
        part += 2 * tiles;

        UNROLL for (int i = 0; i < 2; i++) {
            total[i] += shuffle_xor(total[i], 1);
            total[i] += shuffle_xor(total[i], 2);
        }
        if (low) {
            if (tiles > 1) add_up(acc, peak, total, second);
            release(queries_free(), false);
            if (second) return;
        }
        store(acc, total, row, begin, rows, low ? 0 : second * HALF);
    }

    // logits = q k^T of the keys in part n. The products are under way when this returns.
    DEVICE_METHOD void products(float (&logits)[KEYS / 8][4], u32 queries, u32 n) {
        const u64 q = matrix(queries, 16), k = matrix(buffer(n), 16);
        UNROLL for (int d = 0; d < D / 16; d++) {
            const int further = (d / 4 * PANEL + d % 4 * 32) / 16;
            multiply_transposed(logits, q + further, k + further, d > 0, T());
        }
        matrices_end();
    }

    // acc += weights v of the values in part n, likewise.
    DEVICE_METHOD void weighted(float (&acc)[D / 8][4], const u32 (&weights)[KEYS / 16][4], u32 n) {
        const u64 v = matrix(buffer(n), PANEL);
        UNROLL for (int i = 0; i < KEYS / 16; i++) multiply_add(acc, weights[i], v + i * (16 * 128 / 16), T());
        matrices_end();
    }

    // logits become weights relative to the highest logit so far; what was summed up before fades by as much as that
    // rose.
    DEVICE_METHOD void softmax(float (&logits)[KEYS / 8][4], float (&peak)[2], float (&total)[2], float (&fade)[2],
                               u32 n, bool plain) {
        if (!plain)
            UNROLL for (int i = 0; i < KEYS / 8; i++)
                UNROLL for (int j = 0; j < 2; j++) {
                    const float bias = load_shared_float(biases(n) + (i * 8 + (lane & 3) * 2 + j) * 4);
                    logits[i][j] += bias, logits[i][2 + j] += bias;
                }
        UNROLL for (int i = 0; i < 2; i++) {
            float most = peak[i];
            UNROLL for (int c = 0; c < KEYS / 8; c++) most = fmaxf(most, fmaxf(logits[c][2 * i], logits[c][2 * i + 1]));
            most = fmaxf(most, shuffle_xor(most, 1));
            most = fmaxf(most, shuffle_xor(most, 2));
            const float shift = most * p.scale;
            fade[i] = exp2_fast((peak[i] - most) * p.scale);
            peak[i] = most;
            float sum = 0.0f;
            UNROLL for (int c = 0; c < KEYS / 8; c++)
                UNROLL for (int j = 2 * i; j < 2 * i + 2; j++) {
                    logits[c][j] = exp2_fast(logits[c][j] * p.scale - shift);
                    sum += logits[c][j];
                }
            total[i] = total[i] * fade[i] + sum;
        }
    }

    // Sums lie among the lanes as the instruction's other operand has to.
    DEVICE_METHOD void round(u32 (&weights)[KEYS / 16][4], const float (&logits)[KEYS / 8][4]) {
        UNROLL for (int i = 0; i < KEYS / 16; i++)
            UNROLL for (int j = 0; j < 4; j++) {
                const float* w = logits[2 * i + j / 2];
                weights[i][j] = pack(w[j % 2 * 2], w[j % 2 * 2 + 1], T());
            }
    }

    // The second consumer's sums are added to the first's, by way of the queries' place.
    DEVICE_METHOD void add_up(float (&acc)[D / 8][4], float (&peak)[2], float (&total)[2], int second) {
        const int own = thread() % WARPGROUP;
        const u32 sums = base + SUMS + own / 4 * 16;  // of the four lanes that share rows
        named_wait(QUERIES_READ, BOTH);
        if (second) {
            UNROLL for (int n = 0; n < D / 8; n++)
                UNROLL for (int j = 0; j < 4; j++) store_shared(base + ((n * 4 + j) * WARPGROUP + own) * 4, acc[n][j]);
            // Not by an index: an array that is indexed at run time lies in local memory.
            const float a = own & 1 ? peak[1] : peak[0], b = own & 1 ? total[1] : total[0];
            store_shared(sums + own % 4 * 4, own & 2 ? b : a);
            named_arrive(SUMS_WRITTEN, BOTH);
            return;
        }
        named_wait(SUMS_WRITTEN, BOTH);
        float mine[2], theirs[2];
        UNROLL for (int i = 0; i < 2; i++) {
            const float peak_there = load_shared_float(sums + i * 4), most = fmaxf(peak[i], peak_there);
            mine[i] = exp2_fast((peak[i] - most) * p.scale), theirs[i] = exp2_fast((peak_there - most) * p.scale);
            total[i] = total[i] * mine[i] + load_shared_float(sums + 8 + i * 4) * theirs[i];
        }
        UNROLL for (int n = 0; n < D / 8; n++)
            UNROLL for (int j = 0; j < 4; j++) {
                const float there = load_shared_float(base + ((n * 4 + j) * WARPGROUP + own) * 4);
                acc[n][j] = acc[n][j] * mine[j / 2] + there * theirs[j / 2];
            }
    }

    // The results to the tokens' own places, 16 bytes a lane: the four lanes that share a row exchange what they have
    // of four chunks, so that each has one whole.
    DEVICE_METHOD void store(float (&acc)[D / 8][4], float (&total)[2], int row, int begin, int rows, int offset) {
        u16* out = p.out + (i64)(row / p.heads) * p.o_b + (i64)(row % p.heads) * p.o_h;
        const int odd = lane & 1, high = lane & 2;
        UNROLL for (int i = 0; i < 2; i++) {
            const int r = offset + warp % 4 * 16 + lane / 4 + 8 * i;
            i64 token = 0;
            if (r < rows) token = (i64)p.q_order[(i64)row * p.n_video + begin + r] + p.video_start;
            const float inverse = reciprocal(total[i]);
            UNROLL for (int n = 0; n < CHUNKS; n += 4) {
                int x[4];
                UNROLL for (int c = 0; c < 4; c++)
                    x[c] = pack(acc[n + c][2 * i] * inverse, acc[n + c][2 * i + 1] * inverse, T());
                UNROLL for (int c = 0; c < 4; c += 2) {
                    const int got = shuffle(odd ? x[c] : x[c + 1], lane ^ 1);
                    if (odd) x[c] = got;
                    else x[c + 1] = got;
                }
                UNROLL for (int c = 0; c < 2; c++) {
                    const int got = shuffle(high ? x[c] : x[c + 2], lane ^ 2);
                    if (high) x[c] = got;
                    else x[c + 2] = got;
                }
                const uint4 whole = {(u32)x[0], (u32)x[1], (u32)x[2], (u32)x[3]};
                if (r < rows) *(uint4*)(out + token * p.o_n + (n + (lane & 3)) * 8) = whole;
            }
        }
    }
};

#define ATTENTION(T, D)                                                            \
    WARPGROUP_KERNEL(THREADS) void svg2_attention_##T##_##D(PARAMETER Params p) {  \
        SWIZZLED_SHARED_MEMORY;                                                    \
        Program<T, D> program{p, shared_address(smem)};                            \
        program.run();                                                             \
    }
ATTENTION(bf16, 128)
ATTENTION(fp16, 128)
ATTENTION(bf16, 64)
ATTENTION(fp16, 64)
