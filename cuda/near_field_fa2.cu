// The near field in the manner of FlashAttention-2, for sm_80 and up. The contract is svg2_core/ops/near_field/__init__.py;
// the launcher, cuda.py beside it, says what each field holds.
//
// A program answers one query tile of one query cluster, over KEYS keys a step. While a step's keys are multiplied, the next
// ones are copied and those after them looked up.
#ifdef SVG2_EMULATOR
#include "emulator.h"
#else
#include "warp.cuh"
#endif
#include "near_field.cuh"

enum { KEYS = 64, WARPS = 4, THREADS = 32 * WARPS };
static_assert(KEYS == WARPS * GRANULE, "a warp looks up one granule of a step");

template <class T, int D, int ROWS>
struct Program {
    enum { M = ROWS / 64, CHUNKS = D / 8, ROW_BYTES = 2 * D, STAGE = KEYS * ROW_BYTES, Q_BYTES = ROWS * ROW_BYTES };
    // Keys whose logits are held at once: 64 of them for 32 rows and 128 numbers a row would not fit the registers.
    enum { PART = M * D > 128 ? 32 : 64 };
    enum { TURN = KEYS * 8, SHARED = Q_BYTES + 4 * STAGE + 3 * TURN + 4 * ROWS };

    const Params& p;
    unsigned char* smem;
    u32 base;          // of shared memory
    const u16 *k, *v;  // of this batch row and head
    int row, lane, warp;
    Keys<KEYS> keys = {p};

    DEVICE_METHOD int* turn_rows(int t) { return (int*)(smem + Q_BYTES + 4 * STAGE + t % 3 * TURN); }
    DEVICE_METHOD float* turn_biases(int t) { return (float*)(turn_rows(t) + KEYS); }
    DEVICE_METHOD int* tokens() { return (int*)(smem + Q_BYTES + 4 * STAGE + 3 * TURN); }
    // Rows are 16-byte chunks, exchanged so that eight rows of one chunk lie in different banks.
    DEVICE_METHOD u32 chunk(u32 start, int row, int c) { return start + row * ROW_BYTES + ((c ^ (row & 7)) << 4); }
    // From the place of chunk 0 or 1 of a row to that of the chunk 2 d further: rows are multiples of 128 bytes, so it
    // takes one operation and no register of its own.
    DEVICE_METHOD u32 further(u32 place, int d) { return (place ^ ((d & 3) << 5)) + (d >> 2) * 128; }

    DEVICE_METHOD int own_slot() { return warp * GRANULE + lane % GRANULE; }

    DEVICE_METHOD void keep_row(int t, int found, float bias) {
        if (lane < GRANULE) turn_rows(t)[own_slot()] = found, turn_biases(t)[own_slot()] = bias;
    }

    // Copy the keys and values of step t, whose rows have been looked up.
    DEVICE_METHOD void copy_step(int t) {
        u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE, vs = ks + STAGE;
        const int c = thread() % CHUNKS, *rows = turn_rows(t);
        for (int r = thread() / CHUNKS; r < KEYS; r += THREADS / CHUNKS) {
            i64 token = rows[r];
            bool valid = token >= 0;
            token = valid ? token : 0;
            copy16(chunk(ks, r, c), k + token * p.k_n + c * 8, valid);
            copy16(chunk(vs, r, c), v + token * p.v_n + c * 8, valid);
        }
    }

    DEVICE_METHOD void copy_queries(QueryTile tile, const u16* q) {
        for (int r = thread(); r < ROWS; r += THREADS)
            tokens()[r] = tile.begin + r < tile.end ? p.q_order[(i64)row * p.n_queries + tile.begin + r] + p.q_start : -1;
        sync_block();
        const int c = thread() % CHUNKS;
        for (int r = thread() / CHUNKS; r < ROWS; r += THREADS / CHUNKS) {
            i64 token = tokens()[r];
            bool valid = token >= 0;
            copy16(chunk(base, r, c), q + (valid ? token : 0) * p.q_n + c * 8, valid);
        }
    }

    DEVICE_METHOD void run() {
        lane = thread() & 31, warp = thread() >> 5, row = block_y();
        base = shared_address(smem);
        if (block_x() >= p.numbers[row]) return;
        const QueryTile tile = query_tile(p, row, p.tiles[(i64)row * p.most + block_x()]);
        keys.start(row, tile.cluster);
        const i64 batch = row / p.heads, head = row % p.heads;
        k = p.k + batch * p.k_b + head * p.k_h, v = p.v + batch * p.v_b + head * p.v_h;

        float bias;
        for (int t = 0; t < 2; t++) {
            const int found = keys.token_of(t, own_slot(), keys.granule_of(t, own_slot()), bias);
            keep_row(t, found, bias);
        }
        int granule = keys.granule_of(2, own_slot());
        copy_queries(tile, p.q + batch * p.q_b + head * p.q_h);  // and a barrier, after which the rows can be read
        copy_step(0);
        copies_end();

        float acc[M][D / 8][4], peak[M][2], total[M][2];
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < D / 8; i++) for (int j = 0; j < 4; j++) acc[m][i][j] = 0.0f;
            for (int i = 0; i < 2; i++) peak[m][i] = -1e30f, total[m][i] = 0.0f;  // finite: a masked step must not make NaN
        }
        for (int t = 0; t < keys.steps; t++) {
            // Step t has come, and nobody reads the step before it any more.
            copies_wait();
            sync_block();
            if (t + 1 < keys.steps) copy_step(t + 1);
            copies_end();
            const int found = keys.token_of(t + 2, own_slot(), granule, bias);
            NOT_UNROLLED for (int part = 0; part < KEYS; part += PART) {
                float logits[M][PART / 8][4];
                products(logits, t, part);
                if (part == 0) keep_row(t + 2, found, bias), granule = keys.granule_of(t + 3, own_slot());
                softmax(logits, acc, peak, total);
                weighted(acc, logits, t, part);
            }
        }
        store(acc, peak, total, p.out + batch * p.o_b + head * p.o_h);
    }

    // logits = q k^T + bias of step t. A thread holds rows lane / 4 and 8 below it, columns 2 (lane % 4) and the next, of each 16 x 8.
    DEVICE_METHOD void products(float (&logits)[M][PART / 8][4], int t, int part) {
        const u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE + part * ROW_BYTES;
        const u32 q_place = chunk(base, warp * M * 16 + (lane & 15), lane >> 4);
        const float* biases = turn_biases(t) + part + (lane & 3) * 2;
        const u32 k_place = chunk(ks, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int n = 0; n < PART / 8; n++)
                UNROLL for (int j = 0; j < 4; j++) logits[m][n][j] = biases[n * 8 + j % 2];
        UNROLL for (int d = 0; d < D / 16; d++) {
            u32 a[M][4];
            UNROLL for (int m = 0; m < M; m++)
                load_matrices(a[m], further(q_place, d) + m * 16 * ROW_BYTES);
            UNROLL for (int n = 0; n < PART / 16; n++) {
                u32 b[4];
                load_matrices(b, further(k_place, d) + n * 16 * ROW_BYTES);
                UNROLL for (int m = 0; m < M; m++) {
                    multiply(logits[m][2 * n], a[m], b[0], b[1], T());
                    multiply(logits[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }
    }

    // logits become weights relative to the highest logit so far; what was summed up before fades by as much as that rose.
    DEVICE_METHOD void softmax(float (&logits)[M][PART / 8][4], float (&acc)[M][D / 8][4], float (&peak)[M][2],
                               float (&total)[M][2]) {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
                float most = peak[m][i];
                UNROLL for (int n = 0; n < PART / 8; n++) most = fmaxf(most, fmaxf(logits[m][n][2 * i], logits[m][n][2 * i + 1]));
                most = fmaxf(most, shuffle_xor(most, 1));
                most = fmaxf(most, shuffle_xor(most, 2));
                const float fade = exp2_fast((peak[m][i] - most) * p.scale), shift = most * p.scale;
                peak[m][i] = most;
                float sum = 0.0f;
                UNROLL for (int n = 0; n < PART / 8; n++)
                    UNROLL for (int j = 2 * i; j < 2 * i + 2; j++) {
                        logits[m][n][j] = exp2_fast(logits[m][n][j] * p.scale - shift);
                        sum += logits[m][n][j];
                    }
                total[m][i] = total[m][i] * fade + sum;
                if (any_in_warp(fade != 1.0f))  // seldom, after the first few steps
                    UNROLL for (int n = 0; n < D / 8; n++) acc[m][n][2 * i] *= fade, acc[m][n][2 * i + 1] *= fade;
            }
    }

    // acc += weights v of step t.
    DEVICE_METHOD void weighted(float (&acc)[M][D / 8][4], const float (&weights)[M][PART / 8][4], int t, int part) {
        const u32 vs = base + Q_BYTES + (t & 1) * 2 * STAGE + STAGE + part * ROW_BYTES;
        const u32 v_place = chunk(vs, lane & 15, lane >> 4);
        UNROLL for (int n = 0; n < PART / 16; n++) {
            u32 a[M][4];
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int j = 0; j < 4; j++) {
                    const float* w = weights[m][2 * n + j / 2];
                    a[m][j] = pack(w[j % 2 * 2], w[j % 2 * 2 + 1], T());
                }
            UNROLL for (int d = 0; d < D / 16; d++) {
                u32 b[4];
                load_matrices_transposed(b, further(v_place, d) + n * 16 * ROW_BYTES);
                UNROLL for (int m = 0; m < M; m++) {
                    multiply(acc[m][2 * d], a[m], b[0], b[1], T());
                    multiply(acc[m][2 * d + 1], a[m], b[2], b[3], T());
                }
            }
        }
    }

    // The results, by way of this warp's own query rows in shared memory, to the tokens' own places.
    DEVICE_METHOD void store(float (&acc)[M][D / 8][4], float (&peak)[M][2], float (&total)[M][2], u16* out) {
        sync_warp();
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
                float sum = total[m][i];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const float inverse = 1.0f / fmaxf(sum, NO_SUM);
                const int r = (warp * M + m) * 16 + (lane >> 2) + 8 * i, token = tokens()[r];
                if (token >= 0 && lane % 4 == 0)
                    p.logsumexp[(i64)row * p.n_queries + token - p.q_start] = logsumexp_of(peak[m][i], sum, p.scale);
                UNROLL for (int n = 0; n < D / 8; n++)
                    *(u32*)(smem + chunk(0, r, n) + (lane & 3) * 4) = pack(acc[m][n][2 * i] * inverse, acc[m][n][2 * i + 1] * inverse, T());
            }
        sync_warp();
        for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
            const int r = warp * M * 16 + i / CHUNKS, c = i % CHUNKS;
            const i64 token = tokens()[r];
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
