// Near field kernels in the manner of FlashAttention-2, for sm_80 and up. The contract is svg2_core/ops/near_field/__init__.py;
// the launcher is cuda.py beside it, packing.py fills the parameter.
//
// A program answers one query tile of one query cluster, in key blocks of KEYS a step. While a key block is multiplied, the next
// one is copied and the indices of the one after it are looked up.
#ifdef SVG2_EMULATOR
#include "emulator.h"
#else
#include "warp.cuh"
#endif
#include "near_field.cuh"

enum { KEYS = 64, WARPS = 4, THREADS = 32 * WARPS };
static_assert(KEYS == WARPS * GRANULE, "a warp looks up one granule of a key block");

template <class T, int D, int ROWS>
struct Program {
    enum { M = ROWS / 64, CHUNKS = D / 8, ROW_BYTES = 2 * D, STAGE = KEYS * ROW_BYTES, Q_BYTES = ROWS * ROW_BYTES };
    // Columns of a key block whose logits are held at once: 64 of them, for 32 rows and D = 128, would not fit the registers.
    enum { SUBTILE = M * D > 128 ? 32 : 64 };
    enum { INDEX_STAGE = KEYS * 8, SHARED = Q_BYTES + 4 * STAGE + 3 * INDEX_STAGE + 4 * ROWS };

    const Params& p;
    unsigned char* smem;
    u32 base;          // of shared memory
    const u16 *k, *v;  // of this batch row and head
    int row, lane, warp;
    Keys<KEYS> keys = {p};

    DEVICE_METHOD int* key_tokens(int t) { return (int*)(smem + Q_BYTES + 4 * STAGE + t % 3 * INDEX_STAGE); }
    DEVICE_METHOD float* key_biases(int t) { return (float*)(key_tokens(t) + KEYS); }
    DEVICE_METHOD int* query_tokens() { return (int*)(smem + Q_BYTES + 4 * STAGE + 3 * INDEX_STAGE); }
    // Rows are 16-byte chunks, swizzled so that eight rows of one chunk lie in different banks.
    DEVICE_METHOD u32 chunk(u32 start, int row, int c) { return start + row * ROW_BYTES + ((c ^ (row & 7)) << 4); }
    // From the address of chunk 0 or 1 of a row to that of the chunk 2 d further: rows are multiples of 128 bytes, so it
    // takes one operation and no register of its own.
    DEVICE_METHOD u32 advance(u32 address, int d) { return (address ^ ((d & 3) << 5)) + (d >> 2) * 128; }

    DEVICE_METHOD int own_column() { return warp * GRANULE + lane % GRANULE; }

    DEVICE_METHOD void store_index(int t, int key_token, float bias) {
        if (lane < GRANULE) key_tokens(t)[own_column()] = key_token, key_biases(t)[own_column()] = bias;
    }

    // Copy the keys and values of step t, whose indices have been looked up.
    DEVICE_METHOD void copy_key_block(int t) {
        u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE, vs = ks + STAGE;
        const int c = thread() % CHUNKS, *rows = key_tokens(t);
        for (int r = thread() / CHUNKS; r < KEYS; r += THREADS / CHUNKS) {
            i64 token = rows[r];
            bool valid = token >= 0;
            token = valid ? token : 0;
            copy16(chunk(ks, r, c), k + token * p.k_n + c * 8, valid);
            copy16(chunk(vs, r, c), v + token * p.v_n + c * 8, valid);
        }
    }

    DEVICE_METHOD void copy_query_tile(QueryTile tile, const u16* q) {
        for (int r = thread(); r < ROWS; r += THREADS)
            query_tokens()[r] = tile.begin + r < tile.end ? p.q_order[(i64)row * p.n_queries + tile.begin + r] + p.q_start : -1;
        sync_block();
        const int c = thread() % CHUNKS;
        for (int r = thread() / CHUNKS; r < ROWS; r += THREADS / CHUNKS) {
            i64 token = query_tokens()[r];
            bool valid = token >= 0;
            copy16(chunk(base, r, c), q + (valid ? token : 0) * p.q_n + c * 8, valid);
        }
    }

    DEVICE_METHOD void run() {
        lane = thread() & 31, warp = thread() >> 5, row = block_y();
        base = shared_address(smem);
        if (block_x() >= p.tile_counts[row]) return;
        const QueryTile tile = query_tile(p, row, p.tiles[(i64)row * p.tile_stride + block_x()]);
        keys.start(row, tile.cluster);
        const i64 batch = row / p.heads, head = row % p.heads;
        k = p.k + batch * p.k_b + head * p.k_h, v = p.v + batch * p.v_b + head * p.v_h;

        float bias;
        for (int t = 0; t < 2; t++) {
            const int key_token = keys.token_of(t, own_column(), keys.granule_of(t, own_column()), bias);
            store_index(t, key_token, bias);
        }
        int granule = keys.granule_of(2, own_column());
        copy_query_tile(tile, p.q + batch * p.q_b + head * p.q_h);  // and a barrier, after which the indices can be read
        copy_key_block(0);
        copies_end();

        float acc[M][D / 8][4], row_max[M][2], row_sum[M][2];
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < D / 8; i++) for (int j = 0; j < 4; j++) acc[m][i][j] = 0.0f;
            for (int i = 0; i < 2; i++) row_max[m][i] = -1e30f, row_sum[m][i] = 0.0f;  // finite: a masked key block must not make NaN
        }
        for (int t = 0; t < keys.steps; t++) {
            // Step t has arrived, and no thread reads the step before it any more.
            copies_wait();
            sync_block();
            if (t + 1 < keys.steps) copy_key_block(t + 1);
            copies_end();
            const int key_token = keys.token_of(t + 2, own_column(), granule, bias);
            NOT_UNROLLED for (int subtile = 0; subtile < KEYS; subtile += SUBTILE) {
                float logits[M][SUBTILE / 8][4];
                products(logits, t, subtile);
                if (subtile == 0) store_index(t + 2, key_token, bias), granule = keys.granule_of(t + 3, own_column());
                softmax(logits, acc, row_max, row_sum);
                weighted(acc, logits, t, subtile);
            }
        }
        store(acc, row_max, row_sum, p.out + batch * p.o_b + head * p.o_h);
    }

    // logits = q k^T + bias of step t. A thread holds rows lane / 4 and 8 below it, columns 2 (lane % 4) and the next, of each 16 x 8.
    DEVICE_METHOD void products(float (&logits)[M][SUBTILE / 8][4], int t, int subtile) {
        const u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE + subtile * ROW_BYTES;
        const u32 q_address = chunk(base, warp * M * 16 + (lane & 15), lane >> 4);
        const float* biases = key_biases(t) + subtile + (lane & 3) * 2;
        const u32 k_address = chunk(ks, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int n = 0; n < SUBTILE / 8; n++)
                UNROLL for (int j = 0; j < 4; j++) logits[m][n][j] = biases[n * 8 + j % 2];
        UNROLL for (int d = 0; d < D / 16; d++) {
            u32 a[M][4];
            UNROLL for (int m = 0; m < M; m++)
                load_matrices(a[m], advance(q_address, d) + m * 16 * ROW_BYTES);
            UNROLL for (int n = 0; n < SUBTILE / 16; n++) {
                u32 b[4];
                load_matrices(b, advance(k_address, d) + n * 16 * ROW_BYTES);
                UNROLL for (int m = 0; m < M; m++) {
                    multiply(logits[m][2 * n], a[m], b[0], b[1], T());
                    multiply(logits[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }
    }

    // Online softmax: logits become weights relative to the running max; earlier sums are rescaled to it.
    DEVICE_METHOD void softmax(float (&logits)[M][SUBTILE / 8][4], float (&acc)[M][D / 8][4], float (&row_max)[M][2],
                               float (&row_sum)[M][2]) {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
                float new_max = row_max[m][i];
                UNROLL for (int n = 0; n < SUBTILE / 8; n++)
                    new_max = fmaxf(new_max, fmaxf(logits[m][n][2 * i], logits[m][n][2 * i + 1]));
                new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
                new_max = fmaxf(new_max, shuffle_xor(new_max, 2));
                const float rescale = exp2_fast((row_max[m][i] - new_max) * p.scale), scaled_max = new_max * p.scale;
                row_max[m][i] = new_max;
                float sum = 0.0f;
                UNROLL for (int n = 0; n < SUBTILE / 8; n++)
                    UNROLL for (int j = 2 * i; j < 2 * i + 2; j++) {
                        logits[m][n][j] = exp2_fast(logits[m][n][j] * p.scale - scaled_max);
                        sum += logits[m][n][j];
                    }
                row_sum[m][i] = row_sum[m][i] * rescale + sum;
                if (any_in_warp(rescale != 1.0f))  // rare after the first few steps
                    UNROLL for (int n = 0; n < D / 8; n++) acc[m][n][2 * i] *= rescale, acc[m][n][2 * i + 1] *= rescale;
            }
    }

    // acc += weights v of step t.
    DEVICE_METHOD void weighted(float (&acc)[M][D / 8][4], const float (&weights)[M][SUBTILE / 8][4], int t, int subtile) {
        const u32 vs = base + Q_BYTES + (t & 1) * 2 * STAGE + STAGE + subtile * ROW_BYTES;
        const u32 v_address = chunk(vs, lane & 15, lane >> 4);
        UNROLL for (int n = 0; n < SUBTILE / 16; n++) {
            u32 a[M][4];
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int j = 0; j < 4; j++) {
                    const float* w = weights[m][2 * n + j / 2];
                    a[m][j] = pack(w[j % 2 * 2], w[j % 2 * 2 + 1], T());
                }
            UNROLL for (int d = 0; d < D / 16; d++) {
                u32 b[4];
                load_matrices_transposed(b, advance(v_address, d) + n * 16 * ROW_BYTES);
                UNROLL for (int m = 0; m < M; m++) {
                    multiply(acc[m][2 * d], a[m], b[0], b[1], T());
                    multiply(acc[m][2 * d + 1], a[m], b[2], b[3], T());
                }
            }
        }
    }

    // Epilogue: the results, by way of this warp's own query rows in shared memory, scattered to their tokens.
    DEVICE_METHOD void store(float (&acc)[M][D / 8][4], float (&row_max)[M][2], float (&row_sum)[M][2], u16* out) {
        sync_warp();
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
                float sum = row_sum[m][i];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const float inverse = 1.0f / fmaxf(sum, NO_SUM);
                const int r = (warp * M + m) * 16 + (lane >> 2) + 8 * i, token = query_tokens()[r];
                if (token >= 0 && lane % 4 == 0)
                    p.logsumexp[(i64)row * p.n_queries + token - p.q_start] = logsumexp_of(row_max[m][i], sum, p.scale);
                UNROLL for (int n = 0; n < D / 8; n++)
                    *(u32*)(smem + chunk(0, r, n) + (lane & 3) * 4) = pack(acc[m][n][2 * i] * inverse, acc[m][n][2 * i + 1] * inverse, T());
            }
        sync_warp();
        for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
            const int r = warp * M * 16 + i / CHUNKS, c = i % CHUNKS;
            const i64 token = query_tokens()[r];
            if (token >= 0) *(uint4*)(out + token * p.o_n + c * 8) = *(const uint4*)(smem + chunk(0, r, c));
        }
    }
};

#define NEAR_FIELD(T, D, ROWS)                                             \
    KERNEL void svg2_near_field_##T##_##D##_##ROWS(PARAMETER Params p) {   \
        SHARED_MEMORY;                                                     \
        Program<T, D, ROWS> program{p, smem};                              \
        program.run();                                                     \
    }
NEAR_FIELD(bf16, 128, 128)
NEAR_FIELD(bf16, 128, 64)
NEAR_FIELD(fp16, 128, 128)
NEAR_FIELD(fp16, 128, 64)
NEAR_FIELD(bf16, 64, 128)
NEAR_FIELD(bf16, 64, 64)
NEAR_FIELD(fp16, 64, 128)
NEAR_FIELD(fp16, 64, 64)
