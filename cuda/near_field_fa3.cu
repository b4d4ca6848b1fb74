// Near field kernels in the manner of FlashAttention-3, for compute capability 9.0. The contract is
// svg2_core/ops/near_field/__init__.py; the launcher is cuda.py beside it, packing.py fills the parameter.
//
// Programs are persistent: they fetch one query tile of one query cluster after another, longest first. The first
// warpgroup of a program, the producer, gathers keys and values into a ring of stages, KEYS keys a step; two consumers
// multiply. A tile of up to 128 rows is halved: each consumer has 64 rows and all key blocks. A tile of up to 64 rows is
// split by keys: each consumer has all rows and every other key block, and their sums are reduced in the end.
#ifdef SVG2_EMULATOR
#include "warpgroup.h"
#else
#include "warpgroup.cuh"
#endif
#include "near_field.cuh"

enum { KEYS = 128, HALF = 64, WARPGROUP = 128, THREADS = 3 * WARPGROUP, BOTH_CONSUMERS = 2 * WARPGROUP };
enum { KEYS_PER_WARP = 32 };  // keys of a step that a warp of the producer looks up: one a lane
enum { MAX_PENDING = 2 };     // stages whose copies may be in flight behind the latest one
// The register file has 65,536; at launch a thread gets 168, and the sum may not grow (setmaxnreg).
enum { PRODUCER_REGISTERS = 88, CONSUMER_REGISTERS = 208 };
enum Name { FIRST_MULTIPLIES = 1, SECOND_MULTIPLIES, QUERIES_READ, SUMS_WRITTEN, PRODUCER };  // named barriers; 0 is the block's

// The descriptor of a matrix in shared memory: rows of 128 bytes whose 16-byte chunks are permuted by the
// last three bits of the row (128-byte swizzle), eight rows 1024 bytes apart from the next eight. panel: bytes from 64
// columns to the next 64; counts where the columns are the dimension that is not summed over.
DEVICE u64 matrix(u32 start, u32 panel) {
    return (u64)(start >> 4 & 0x3fff) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <class T, int D>
struct Program {
    // A matrix of 128 rows lies in panels of 64 columns: rows of 128 bytes, swizzled. A stage is the keys or the values
    // of a step; the ring holds STAGES of them. Keys and values alternate, so keys have the even buffers.
    enum { CHUNKS = D / 8, PANEL = 128 * 128, STAGE = D / 64 * PANEL, STAGES = 768 / D };
    enum {
        RING = STAGE, BIASES = RING + STAGES * STAGE, SUMS = BIASES + STAGES / 2 * KEYS * 4, HEADER = SUMS + WARPGROUP * 4,
        TILE_ENTRIES = HEADER + 32, BARRIERS = TILE_ENTRIES + 2 * 16, SHARED = BARRIERS + (2 * STAGES + 2) * 8
    };

    const Params& p;
    u32 base;  // of shared memory; the queries come first
    int lane, warp;
    u32 stage;  // index of the query tile's first stage, of all that went through the ring

    DEVICE_METHOD u32 full(u32 n) { return base + BARRIERS + n % STAGES * 8; }
    DEVICE_METHOD u32 free(u32 n) { return base + BARRIERS + (STAGES + n % STAGES) * 8; }
    DEVICE_METHOD u32 queries_full() { return base + BARRIERS + 2 * STAGES * 8; }
    DEVICE_METHOD u32 queries_free() { return queries_full() + 8; }
    DEVICE_METHOD int parity(u32 n) { return n / STAGES & 1; }
    DEVICE_METHOD u32 buffer(u32 n) { return base + RING + n % STAGES * STAGE; }
    DEVICE_METHOD u32 biases(u32 n) { return base + BIASES + n % STAGES / 2 * (KEYS * 4); }

    DEVICE_METHOD void run() {
        lane = thread() & 31, warp = warp_index(), stage = 0;
        if (thread() == 0) {
            // Arrivals are of warps.
            for (int i = 0; i < STAGES; i++) barrier_init(full(i), 4), barrier_init(free(i), 8);
            barrier_init(queries_full(), 4), barrier_init(queries_free(), 8);
        }
        sync_block();
        if (warp < 4) produce();
        else consume();
    }

    // The producer. These fields are of its current query tile.

    int row, begin, rows;
    Keys<KEYS> keys = {p};
    u32 pending[MAX_PENDING];  // the barriers of stages whose copies are in flight, oldest first; 0 for none

    DEVICE_METHOD void produce() {
        give_registers<PRODUCER_REGISTERS>();
        UNROLL for (int i = 0; i < MAX_PENDING; i++) pending[i] = 0;
        int next_row = 0;
        if (thread() == 0) fetch_tile(0, next_row);
        for (int iteration = 0;; iteration++) {
            read_tile(iteration);
            if (thread() == 0 && rows > 0) fetch_tile(iteration + 1, next_row);  // while the consumers have a full ring
            gather(iteration);
            if (rows == 0) break;  // the consumers read the same header
        }
        flush();
    }

    DEVICE_METHOD u32 tile_entry(int iteration) { return base + TILE_ENTRIES + (iteration & 1) * 16; }

    // Tile scheduler, one thread: the next query tile of its row (of batch and head), or, when that is exhausted, of the next. The
    // keys and values of one row fit in the GPU's L2 cache and those of all do not. A tile without rows ends the program.
    DEVICE_METHOD void fetch_tile(int iteration, int& next_row) {
        QueryTile tile = {0, 0, 0};
        for (; next_row < p.rows; next_row++) {
            const int fetched = take_next(p.next_tile + next_row), high = p.tile_counts[next_row];
            if (fetched >= high + p.tile_counts[p.rows + next_row]) continue;
            const i64 counts_row = fetched < high ? next_row : p.rows + next_row;
            tile = query_tile(p, next_row, p.tiles[counts_row * p.tile_stride + (fetched < high ? fetched : fetched - high)]);
            break;
        }
        store_shared(tile_entry(iteration), next_row), store_shared(tile_entry(iteration) + 4, tile.cluster);
        store_shared(tile_entry(iteration) + 8, tile.begin), store_shared(tile_entry(iteration) + 12, tile.end - tile.begin);
    }

    DEVICE_METHOD void read_tile(int iteration) {
        flush();  // consumers may wait for the pending stages
        named_wait(PRODUCER, WARPGROUP);
        const u32 address = tile_entry(iteration);
        row = load_shared_int(address), begin = load_shared_int(address + 8), rows = load_shared_int(address + 12);
        rows = rows < HIGH ? rows : HIGH;
        keys.steps = 0;
        if (rows > 0) keys.start(row, load_shared_int(address + 4));
    }

    enum Matrix { OF_KEYS, OF_VALUES, OF_QUERIES };

    DEVICE_METHOD void gather(int iteration) {
        const int rows_read = rows > HALF ? 2 * HALF : rows > 0 ? HALF : 0;  // rows of the tile that the consumers read
        int query = -1;
        if (warp * KEYS_PER_WARP + lane < rows)
            query = p.q_order[(i64)row * p.n_queries + begin + warp * KEYS_PER_WARP + lane] + p.q_start;
        // Two dependent loads lie between a column and its token: they run ahead of the copies, a step each.
        const int column = warp * KEYS_PER_WARP + lane;
        float bias, next_bias;
        int token = keys.token_of(0, column, keys.granule_of(0, column), bias), granule = keys.granule_of(1, column);
        NOT_UNROLLED for (int t = 0; t == 0 || t < keys.steps; t++) {
            const int next_token = keys.token_of(t + 1, column, granule, next_bias);
            granule = keys.granule_of(t + 2, column);
            // The queries follow the first key block: its stages may be free before their buffer is.
            NOT_UNROLLED for (int m = rows > 0 ? OF_KEYS : OF_QUERIES; m <= (t > 0 ? OF_VALUES : OF_QUERIES); m++) {
                if (m == OF_QUERIES) {
                    wait_for(queries_free(), (iteration & 1) ^ 1);
                    if (thread() == 0) {
                        store_shared(base + HEADER, rows), store_shared(base + HEADER + 4, begin);
                        store_shared(base + HEADER + 8, row), store_shared(base + HEADER + 12, keys.steps);
                        store_shared(base + HEADER + 16, keys.key_steps);
                    }
                } else {
                    wait_for(free(stage), parity(stage) ^ 1);
                    if (m == OF_KEYS) store_shared(biases(stage) + column * 4, bias);
                }
                if (m != OF_QUERIES || warp * KEYS_PER_WARP < rows_read) copy_rows(m, m == OF_QUERIES ? query : token);
                commit(m == OF_QUERIES ? queries_full() : full(stage++));
            }
            token = next_token, bias = next_bias;
        }
    }

    // Copy the warp's 32 rows of a matrix; own_token: of this lane's row, less than 0 for zeros. Several lanes share a row.
    DEVICE_METHOD void copy_rows(int m, int own_token) {
        enum { AT_ONCE = 32 / CHUNKS, COPIES = 4 };
        const int c = lane % CHUNKS, r = lane / CHUNKS;
        const i64 batch = row / p.heads, head = row % p.heads;
        const u16* from;
        i64 stride;
        if (m == OF_QUERIES) from = p.q + batch * p.q_b + head * p.q_h, stride = p.q_n;
        else if (m == OF_KEYS) from = p.k + batch * p.k_b + head * p.k_h, stride = p.k_n;
        else from = p.v + batch * p.v_b + head * p.v_h, stride = p.v_n;
        from += c * 8;
        const u32 to = m == OF_QUERIES ? base : buffer(stage);
        const u32 address = to + c / 8 * PANEL + (warp * KEYS_PER_WARP + r) * 128 + ((c & 7) ^ r) * 16;
        NOT_UNROLLED for (int i = 0; i < 32; i += COPIES * AT_ONCE)
            UNROLL for (int j = 0; j < COPIES * AT_ONCE; j += AT_ONCE) {
                const int token = shuffle(own_token, i + j + r);
                const u16* row_at = from + (token < 0 ? 0 : token) * stride;
                // i + j and r have no bits in common, and a panel is a multiple of 1024 bytes: one operation swizzles.
                copy16((address ^ ((i + j & 7) << 4)) + (i + j) * 128, row_at, token >= 0);
            }
    }

    // Commit the copies so far as a group. `barrier` is signalled once they have arrived, MAX_PENDING groups later.
    DEVICE_METHOD void commit(u32 barrier) {
        copies_end();
        if (pending[0]) {
            copies_wait_but<MAX_PENDING>();
            signal(pending[0]);
        }
        UNROLL for (int i = 0; i + 1 < MAX_PENDING; i++) pending[i] = pending[i + 1];
        pending[MAX_PENDING - 1] = barrier;
    }

    // Copies write through the generic proxy, matrix instructions read through the async proxy: each lane fences its own.
    DEVICE_METHOD void signal(u32 barrier) {
        fence_for_matrices();
        sync_warp();
        if (lane == 0) barrier_arrive(barrier);
    }

    DEVICE_METHOD void flush() {
        copies_wait_but<0>();
        UNROLL for (int i = 0; i < MAX_PENDING; i++) {
            if (pending[i]) signal(pending[i]);
            pending[i] = 0;
        }
    }

    // Before this warp waits for the consumers, it signals what they may be waiting for.
    DEVICE_METHOD void wait_for(u32 barrier, int phase) {
        if (!shuffle(barrier_passed(barrier, phase), 0)) flush();
        barrier_wait(barrier, phase);
    }

    // The consumers.

    DEVICE_METHOD void consume() {
        take_registers<CONSUMER_REGISTERS>();
        const int second = warp >= 8;
        const int own_barrier = second ? SECOND_MULTIPLIES : FIRST_MULTIPLIES;
        const int other_barrier = second ? FIRST_MULTIPLIES : SECOND_MULTIPLIES;
        if (second) named_arrive(other_barrier, BOTH_CONSUMERS);
        for (int iteration = 0;; iteration++) {
            barrier_wait(queries_full(), iteration & 1);
            if (load_shared_int(base + HEADER) == 0) break;
            attend(second, own_barrier, other_barrier);
        }
        if (!second) named_wait(own_barrier, BOTH_CONSUMERS);  // the other consumer's last arrival
    }

    DEVICE_METHOD void release(u32 barrier, bool twice) {
        sync_warp();
        if (lane == 0) {
            barrier_arrive(barrier);
            if (twice) barrier_arrive(barrier);  // for the consumer that does not read this stage
        }
    }

    DEVICE_METHOD void attend(int second, int own_barrier, int other_barrier) {
        const int rows = load_shared_int(base + HEADER), begin = load_shared_int(base + HEADER + 4);
        const int row = load_shared_int(base + HEADER + 8), steps = load_shared_int(base + HEADER + 12);
        const int key_steps = load_shared_int(base + HEADER + 16);
        const bool low = rows <= HALF;
        const int first = low ? second : 0, stride = low ? 2 : 1;
        const int own_steps = (steps - first + stride - 1) / stride;
        const u32 queries = base + (low ? 0 : second * HALF * 128);

        float acc[D / 8][4], logits[KEYS / 8][4], row_max[2], row_sum[2], rescale[2];
        u32 weights[KEYS / 16][4];
        UNROLL for (int n = 0; n < D / 8; n++) UNROLL for (int j = 0; j < 4; j++) acc[n][j] = 0.0f;
        // row_max is finite: a masked key block must not make NaN.
        UNROLL for (int i = 0; i < 2; i++) row_max[i] = -1e30f, row_sum[i] = 0.0f;

        if (own_steps > 0) {  // there is at least one step
            u32 n = stage + 2 * first;  // the keys' stage; the values are the next
            barrier_wait(full(n), parity(n));
            named_wait(own_barrier, BOTH_CONSUMERS);
            matrices_begin();
            products(logits, queries, n);
            named_arrive(other_barrier, BOTH_CONSUMERS);
            matrices_wait<0>(logits);
            softmax(logits, row_max, row_sum, rescale, n, first < key_steps);
            release(free(n), low);
            pack_weights(weights, logits);
            NOT_UNROLLED for (int t = first + stride; t < steps; t += stride) {
                const u32 values_stage = n + 1;
                n += 2 * stride;
                barrier_wait(full(n), parity(n)), barrier_wait(full(values_stage), parity(values_stage));
                named_wait(own_barrier, BOTH_CONSUMERS);
                matrices_begin();
                products(logits, queries, n);
                weighted(acc, weights, values_stage);
                named_arrive(other_barrier, BOTH_CONSUMERS);
                matrices_wait<1>(logits);
                softmax(logits, row_max, row_sum, rescale, n, t < key_steps);
                release(free(n), low);
                matrices_wait<0>(acc);
                release(free(values_stage), low);
                if (any_in_warp(rescale[0] != 1.0f || rescale[1] != 1.0f))  // rare after the first few steps
                    UNROLL for (int i = 0; i < D / 8; i++) UNROLL for (int j = 0; j < 4; j++) acc[i][j] *= rescale[j / 2];
                pack_weights(weights, logits);
            }
            if (!low) release(queries_free(), false);
            barrier_wait(full(n + 1), parity(n + 1));
            matrices_begin();
            weighted(acc, weights, n + 1);
            matrices_wait<0>(acc);
            release(free(n + 1), low);
        }
        if (low && own_steps < (steps + 1) / 2) {  // the other consumer has one step more, and waits for this one's arrival
            named_wait(own_barrier, BOTH_CONSUMERS);
            named_arrive(other_barrier, BOTH_CONSUMERS);
        }
        stage += 2 * steps;

        UNROLL for (int i = 0; i < 2; i++) {
            row_sum[i] += shuffle_xor(row_sum[i], 1);
            row_sum[i] += shuffle_xor(row_sum[i], 2);
        }
        if (low) {
            if (steps > 1) reduce_consumers(acc, row_max, row_sum, second);
            release(queries_free(), false);
            if (second) return;
        }
        store(acc, row_max, row_sum, row, begin, rows, low ? 0 : second * HALF);
    }

    // logits = q k^T of the keys in stage n. The products are in flight when this returns.
    DEVICE_METHOD void products(float (&logits)[KEYS / 8][4], u32 queries, u32 n) {
        const u64 q = matrix(queries, 16), k = matrix(buffer(n), 16);
        UNROLL for (int d = 0; d < D / 16; d++) {
            const int offset = (d / 4 * PANEL + d % 4 * 32) / 16;
            multiply_transposed(logits, q + offset, k + offset, d > 0, T());
        }
        matrices_end();
    }

    // acc += weights v of the values in stage n, likewise.
    DEVICE_METHOD void weighted(float (&acc)[D / 8][4], const u32 (&weights)[KEYS / 16][4], u32 n) {
        const u64 v = matrix(buffer(n), PANEL);
        UNROLL for (int i = 0; i < KEYS / 16; i++) multiply_add(acc, weights[i], v + i * (16 * 128 / 16), T());
        matrices_end();
    }

    // Online softmax: logits become weights relative to the running max; the caller rescales acc.
    DEVICE_METHOD void softmax(float (&logits)[KEYS / 8][4], float (&row_max)[2], float (&row_sum)[2], float (&rescale)[2],
                               u32 n, bool is_video) {
        UNROLL for (int g = 0; g < KEYS / GRANULE; g++) {
            const u32 granule_biases = biases(n) + g * GRANULE * 4;
            // A granule's padding is at its end: without any, all biases are zero.
            if (is_video && load_shared_float(granule_biases + (GRANULE - 1) * 4) == 0.0f) continue;
            UNROLL for (int i = 0; i < GRANULE / 8; i++)
                UNROLL for (int j = 0; j < 2; j++) {
                    const float bias = load_shared_float(granule_biases + (i * 8 + (lane & 3) * 2 + j) * 4);
                    logits[2 * g + i][j] += bias, logits[2 * g + i][2 + j] += bias;
                }
        }
        UNROLL for (int i = 0; i < 2; i++) {
            float new_max = row_max[i];
            UNROLL for (int c = 0; c < KEYS / 8; c++) new_max = fmaxf(new_max, fmaxf(logits[c][2 * i], logits[c][2 * i + 1]));
            new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
            new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
            const float scaled_max = new_max * p.scale;
            rescale[i] = exp2_fast((row_max[i] - new_max) * p.scale);
            row_max[i] = new_max;
            float sum = 0.0f;
            UNROLL for (int c = 0; c < KEYS / 8; c++)
                UNROLL for (int j = 2 * i; j < 2 * i + 2; j++) {
                    logits[c][j] = exp2_fast(logits[c][j] * p.scale - scaled_max);
                    sum += logits[c][j];
                }
            row_sum[i] = row_sum[i] * rescale[i] + sum;
        }
    }

    // Accumulators have the register layout of the next product's left operand: only the type changes.
    DEVICE_METHOD void pack_weights(u32 (&weights)[KEYS / 16][4], const float (&logits)[KEYS / 8][4]) {
        UNROLL for (int i = 0; i < KEYS / 16; i++)
            UNROLL for (int j = 0; j < 4; j++) {
                const float* w = logits[2 * i + j / 2];
                weights[i][j] = pack(w[j % 2 * 2], w[j % 2 * 2 + 1], T());
            }
    }

    // Split-K reduction: the second consumer's sums are added to the first's, by way of the queries' buffer.
    DEVICE_METHOD void reduce_consumers(float (&acc)[D / 8][4], float (&row_max)[2], float (&row_sum)[2], int second) {
        const int own = thread() % WARPGROUP;
        const u32 sums = base + SUMS + own / 4 * 16;  // of the four lanes that share rows
        named_wait(QUERIES_READ, BOTH_CONSUMERS);
        if (second) {
            UNROLL for (int n = 0; n < D / 8; n++)
                UNROLL for (int j = 0; j < 4; j++) store_shared(base + ((n * 4 + j) * WARPGROUP + own) * 4, acc[n][j]);
            // Not by an index: an array that is indexed at run time lies in local memory.
            const float a = own & 1 ? row_max[1] : row_max[0], b = own & 1 ? row_sum[1] : row_sum[0];
            store_shared(sums + own % 4 * 4, own & 2 ? b : a);
            named_arrive(SUMS_WRITTEN, BOTH_CONSUMERS);
            return;
        }
        named_wait(SUMS_WRITTEN, BOTH_CONSUMERS);
        float own_rescale[2], other_rescale[2];
        UNROLL for (int i = 0; i < 2; i++) {
            const float other_max = load_shared_float(sums + i * 4), new_max = fmaxf(row_max[i], other_max);
            own_rescale[i] = exp2_fast((row_max[i] - new_max) * p.scale);
            other_rescale[i] = exp2_fast((other_max - new_max) * p.scale);
            row_max[i] = new_max;
            row_sum[i] = row_sum[i] * own_rescale[i] + load_shared_float(sums + 8 + i * 4) * other_rescale[i];
        }
        UNROLL for (int n = 0; n < D / 8; n++)
            UNROLL for (int j = 0; j < 4; j++) {
                const float other = load_shared_float(base + ((n * 4 + j) * WARPGROUP + own) * 4);
                acc[n][j] = acc[n][j] * own_rescale[j / 2] + other * other_rescale[j / 2];
            }
    }

    // Epilogue: the results scattered to their tokens, 16 bytes a lane: the four lanes that share a row transpose four chunks
    // among them, so that each holds one.
    DEVICE_METHOD void store(float (&acc)[D / 8][4], float (&row_max)[2], float (&row_sum)[2], int row, int begin, int rows,
                             int offset) {
        u16* out = p.out + (i64)(row / p.heads) * p.o_b + (i64)(row % p.heads) * p.o_h;
        const int odd = lane & 1, high = lane & 2;
        UNROLL for (int i = 0; i < 2; i++) {
            const int r = offset + warp % 4 * 16 + lane / 4 + 8 * i;
            i64 token = 0;
            if (r < rows) token = p.q_order[(i64)row * p.n_queries + begin + r];
            if (r < rows && lane % 4 == 0)
                p.logsumexp[(i64)row * p.n_queries + token] = logsumexp_of(row_max[i], row_sum[i], p.scale);
            token += p.q_start;
            const float inverse = reciprocal(fmaxf(row_sum[i], NO_SUM));
            UNROLL for (int n = 0; n < CHUNKS; n += 4) {
                int x[4];
                UNROLL for (int c = 0; c < 4; c++)
                    x[c] = pack(acc[n + c][2 * i] * inverse, acc[n + c][2 * i + 1] * inverse, T());
                UNROLL for (int c = 0; c < 4; c += 2) {
                    const int received = shuffle(odd ? x[c] : x[c + 1], lane ^ 1);
                    if (odd) x[c] = received;
                    else x[c + 1] = received;
                }
                UNROLL for (int c = 0; c < 2; c++) {
                    const int received = shuffle(high ? x[c] : x[c + 2], lane ^ 2);
                    if (high) x[c] = received;
                    else x[c + 2] = received;
                }
                const uint4 packed = {(u32)x[0], (u32)x[1], (u32)x[2], (u32)x[3]};
                if (r < rows) *(uint4*)(out + token * p.o_n + (n + (lane & 3)) * 8) = packed;
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
