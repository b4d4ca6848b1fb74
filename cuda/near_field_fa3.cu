// The near field in the manner of FlashAttention-3, for compute capability 9.0. The contract is
// svg2_core/ops/near_field/__init__.py; the launcher, cuda_fa3.py beside it, says what each field holds.
//
// Programs stay, and take one query tile of one query cluster after another, longest first. The first warpgroup of a
// program gathers keys and values into a ring of buffers, KEYS keys a step; two others multiply. A tile of up to 128
// rows is halved: each consumer has 64 rows and sees all keys. A tile of up to 64 rows is not: each consumer has all
// rows and every other step of keys, and their sums are added in the end.
#ifdef SVG2_EMULATOR
#include "warpgroup.h"
#else
#include "warpgroup.cuh"
#endif
#include "near_field.cuh"

enum { KEYS = 128, HALF = 64, WARPGROUP = 128, THREADS = 3 * WARPGROUP, BOTH = 2 * WARPGROUP };
enum { SLOTS = 32 };         // of a step, that a warp of the producer looks up: one of each lane
enum { COPIES_AHEAD = 2 };   // parts whose copies may be under way behind the latest one
// The register file has 65,536; at launch a thread gets 168, and the sum may not grow.
enum { PRODUCER_REGISTERS = 88, CONSUMER_REGISTERS = 208 };
enum Name { TURN_OF_FIRST = 1, TURN_OF_SECOND, QUERIES_READ, SUMS_WRITTEN, PRODUCER };  // 0 is everybody's

// A matrix in shared memory as matrix instructions take it: rows of 128 bytes whose 16-byte chunks are exchanged by the
// last three bits of the row (128-byte swizzle), eight rows 1024 bytes apart from the next eight. panel: bytes from 64
// columns to the next 64; counts where the columns are the dimension that is not summed over.
DEVICE u64 matrix(u32 start, u32 panel) {
    return (u64)(start >> 4 & 0x3fff) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <class T, int D>
struct Program {
    // A matrix of 128 rows lies in panels of 64 columns: rows of 128 bytes, swizzled. A part is the keys or the values
    // of a step; the ring holds PARTS of them. Keys and values alternate, so keys have the even buffers.
    enum { CHUNKS = D / 8, PANEL = 128 * 128, PART = D / 64 * PANEL, PARTS = 768 / D };
    enum {
        RING = PART, BIASES = RING + PARTS * PART, SUMS = BIASES + PARTS / 2 * KEYS * 4, HEADER = SUMS + WARPGROUP * 4,
        TILES = HEADER + 32, BARRIERS = TILES + 2 * 16, SHARED = BARRIERS + (2 * PARTS + 2) * 8
    };

    const Params& p;
    u32 base;  // of shared memory; the queries come first
    int lane, warp;
    u32 part;  // the number of the query tile's first part, of all that went through the ring

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

    // The producer. What follows is of the query tile that it works on.

    int row, begin, rows;
    Keys<KEYS> keys = {p};
    u32 waiting[COPIES_AHEAD];  // the barriers of parts whose copies are under way, oldest first; 0 for none

    DEVICE_METHOD void produce() {
        give_registers<PRODUCER_REGISTERS>();
        UNROLL for (int i = 0; i < COPIES_AHEAD; i++) waiting[i] = 0;
        int next_row = 0;
        if (thread() == 0) take_tile(0, next_row);
        for (int turn = 0;; turn++) {
            learn_tile(turn);
            if (thread() == 0 && rows > 0) take_tile(turn + 1, next_row);  // while the consumers have a ring full to do
            gather(turn);
            if (rows == 0) break;  // the consumers learn it in the same way
        }
        flush();
    }

    DEVICE_METHOD u32 tile_of(int turn) { return base + TILES + (turn & 1) * 16; }

    // One thread takes the next query tile: of its row (of batch and head), or, when that has none left, of the next. The
    // keys and values of one row fit in the GPU's L2 cache and those of all do not. After the last comes one without rows.
    DEVICE_METHOD void take_tile(int turn, int& next_row) {
        QueryTile tile = {0, 0, 0};
        for (; next_row < p.rows; next_row++) {
            const int taken = take_next(p.next + next_row), high = p.numbers[next_row];
            if (taken >= high + p.numbers[p.rows + next_row]) continue;
            const i64 at = taken < high ? next_row : p.rows + next_row;
            tile = query_tile(p, next_row, p.tiles[at * p.most + (taken < high ? taken : taken - high)]);
            break;
        }
        store_shared(tile_of(turn), next_row), store_shared(tile_of(turn) + 4, tile.cluster);
        store_shared(tile_of(turn) + 8, tile.begin), store_shared(tile_of(turn) + 12, tile.end - tile.begin);
    }

    DEVICE_METHOD void learn_tile(int turn) {
        flush();  // consumers may wait for these
        named_wait(PRODUCER, WARPGROUP);
        const u32 place = tile_of(turn);
        row = load_shared_int(place), begin = load_shared_int(place + 8), rows = load_shared_int(place + 12);
        rows = rows < HIGH ? rows : HIGH;
        keys.steps = 0;
        if (rows > 0) keys.start(row, load_shared_int(place + 4));
    }

    enum Matrix { OF_KEYS, OF_VALUES, OF_QUERIES };

    DEVICE_METHOD void gather(int turn) {
        const int read = rows > HALF ? 2 * HALF : rows > 0 ? HALF : 0;  // rows that the consumers read
        int query = -1;
        if (warp * SLOTS + lane < rows)
            query = p.q_order[(i64)row * p.n_queries + begin + warp * SLOTS + lane] + p.q_start;
        // Two loads lie between a slot and its row, the second taking its address from the first: they run ahead of the
        // copies, a step each.
        const int slot = warp * SLOTS + lane;
        float bias, next_bias;
        int found = keys.token_of(0, slot, keys.granule_of(0, slot), bias), granule = keys.granule_of(1, slot);
        NOT_UNROLLED for (int t = 0; t == 0 || t < keys.steps; t++) {
            const int next_found = keys.token_of(t + 1, slot, granule, next_bias);
            granule = keys.granule_of(t + 2, slot);
            // The queries follow the first step: its buffers may be free before theirs is.
            NOT_UNROLLED for (int m = rows > 0 ? OF_KEYS : OF_QUERIES; m <= (t > 0 ? OF_VALUES : OF_QUERIES); m++) {
                if (m == OF_QUERIES) {
                    wait_for(queries_free(), (turn & 1) ^ 1);
                    if (thread() == 0) {
                        store_shared(base + HEADER, rows), store_shared(base + HEADER + 4, begin);
                        store_shared(base + HEADER + 8, row), store_shared(base + HEADER + 12, keys.steps);
                        store_shared(base + HEADER + 16, keys.key_steps);
                    }
                } else {
                    wait_for(free(part), parity(part) ^ 1);
                    if (m == OF_KEYS) store_shared(biases(part) + slot * 4, bias);
                }
                if (m != OF_QUERIES || warp * SLOTS < read) copy_rows(m, m == OF_QUERIES ? query : found);
                submit(m == OF_QUERIES ? queries_full() : full(part++));
            }
            found = next_found, bias = next_bias;
        }
    }

    // Copy the warp's 32 rows of a matrix; `found` is this lane's, less than 0 for zeros. Several lanes share a row.
    DEVICE_METHOD void copy_rows(int m, int found) {
        enum { AT_ONCE = 32 / CHUNKS, COPIES = 4 };
        const int c = lane % CHUNKS, r = lane / CHUNKS;
        const i64 batch = row / p.heads, head = row % p.heads;
        const u16* from;
        i64 stride;
        if (m == OF_QUERIES) from = p.q + batch * p.q_b + head * p.q_h, stride = p.q_n;
        else if (m == OF_KEYS) from = p.k + batch * p.k_b + head * p.k_h, stride = p.k_n;
        else from = p.v + batch * p.v_b + head * p.v_h, stride = p.v_n;
        from += c * 8;
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
        const int row = load_shared_int(base + HEADER + 8), steps = load_shared_int(base + HEADER + 12);
        const int key_steps = load_shared_int(base + HEADER + 16);
        const bool low = rows <= HALF;
        const int first = low ? second : 0, stride = low ? 2 : 1;
        const int own = (steps - first + stride - 1) / stride;
        const u32 queries = base + (low ? 0 : second * HALF * 128);

        float acc[D / 8][4], logits[KEYS / 8][4], peak[2], total[2], fade[2];
        u32 weights[KEYS / 16][4];
        UNROLL for (int n = 0; n < D / 8; n++) UNROLL for (int j = 0; j < 4; j++) acc[n][j] = 0.0f;
        // The peak is finite: a masked step must not make NaN.
        UNROLL for (int i = 0; i < 2; i++) peak[i] = -1e30f, total[i] = 0.0f;

        if (own > 0) {  // there is at least one step
            u32 n = part + 2 * first;  // the keys' part; the values are the next
            barrier_wait(full(n), parity(n));
            named_wait(my_turn, BOTH);
            matrices_begin();
            products(logits, queries, n);
            named_arrive(others_turn, BOTH);
            matrices_wait<0>(logits);
            softmax(logits, peak, total, fade, n, first < key_steps);
            release(free(n), low);
            round(weights, logits);
            NOT_UNROLLED for (int t = first + stride; t < steps; t += stride) {
                const u32 last = n + 1;
                n += 2 * stride;
                barrier_wait(full(n), parity(n)), barrier_wait(full(last), parity(last));
                named_wait(my_turn, BOTH);
                matrices_begin();
                products(logits, queries, n);
                weighted(acc, weights, last);
                named_arrive(others_turn, BOTH);
                matrices_wait<1>(logits);
                softmax(logits, peak, total, fade, n, t < key_steps);
                release(free(n), low);
                matrices_wait<0>(acc);
                release(free(last), low);
                if (any_in_warp(fade[0] != 1.0f || fade[1] != 1.0f))  // seldom, after the first few steps
                    UNROLL for (int i = 0; i < D / 8; i++) UNROLL for (int j = 0; j < 4; j++) acc[i][j] *= fade[j / 2];
                round(weights, logits);
            }
            if (!low) release(queries_free(), false);
            barrier_wait(full(n + 1), parity(n + 1));
            matrices_begin();
            weighted(acc, weights, n + 1);
            matrices_wait<0>(acc);
            release(free(n + 1), low);
        }
        if (low && own < (steps + 1) / 2) {  // the other consumer has one step more, and so a turn
            named_wait(my_turn, BOTH);
            named_arrive(others_turn, BOTH);
        }
        part += 2 * steps;

        UNROLL for (int i = 0; i < 2; i++) {
            total[i] += shuffle_xor(total[i], 1);
            total[i] += shuffle_xor(total[i], 2);
        }
        if (low) {
            if (steps > 1) add_up(acc, peak, total, second);
            release(queries_free(), false);
            if (second) return;
        }
        store(acc, peak, total, row, begin, rows, low ? 0 : second * HALF);
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
                               u32 n, bool of_video) {
        UNROLL for (int g = 0; g < KEYS / GRANULE; g++) {
            const u32 its = biases(n) + g * GRANULE * 4;
            if (of_video && load_shared_float(its + (GRANULE - 1) * 4) == 0.0f) continue;  // its padding is at the end
            UNROLL for (int i = 0; i < GRANULE / 8; i++)
                UNROLL for (int j = 0; j < 2; j++) {
                    const float bias = load_shared_float(its + (i * 8 + (lane & 3) * 2 + j) * 4);
                    logits[2 * g + i][j] += bias, logits[2 * g + i][2 + j] += bias;
                }
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
            peak[i] = most;
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
    DEVICE_METHOD void store(float (&acc)[D / 8][4], float (&peak)[2], float (&total)[2], int row, int begin, int rows,
                             int offset) {
        u16* out = p.out + (i64)(row / p.heads) * p.o_b + (i64)(row % p.heads) * p.o_h;
        const int odd = lane & 1, high = lane & 2;
        UNROLL for (int i = 0; i < 2; i++) {
            const int r = offset + warp % 4 * 16 + lane / 4 + 8 * i;
            i64 token = 0;
            if (r < rows) token = p.q_order[(i64)row * p.n_queries + begin + r];
            if (r < rows && lane % 4 == 0)
                p.logsumexp[(i64)row * p.n_queries + token] = logsumexp_of(peak[i], total[i], p.scale);
            token += p.q_start;
            const float inverse = reciprocal(fmaxf(total[i], NO_SUM));
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

#define NEAR_FIELD(T, D)                                                           \
    WARPGROUP_KERNEL(THREADS) void svg2_near_field_##T##_##D(PARAMETER Params p) { \
        SWIZZLED_SHARED_MEMORY;                                                    \
        Program<T, D> program{p, shared_address(smem)};                            \
        program.run();                                                             \
    }
NEAR_FIELD(bf16, 128)
NEAR_FIELD(fp16, 128)
NEAR_FIELD(bf16, 64)
NEAR_FIELD(fp16, 64)
