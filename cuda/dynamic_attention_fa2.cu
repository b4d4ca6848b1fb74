// Dynamic-block attention in the manner of FlashAttention-2, for sm_80 and up. The contract is
// svg2_core/ops/dynamic_attention/__init__.py; the launcher, cuda.py beside it, says what each field holds.
//
// A program answers one tile of queries of one query cluster. Its keys come in tiles of KEYS: first those of the selected
// key clusters, packed one after another (plan.cuh lays them out), then text, then one virtual key for each cluster that
// was not selected. While a tile is multiplied, the next one is copied and the one after that is looked up.
#ifdef SVG2_EMULATOR
#include "emulator.h"
#else
#include "warp.cuh"
#endif
#include "plan.cuh"

enum { KEYS = 64, WARPS = 4, THREADS = 32 * WARPS, SLOTS_PER_WARP = KEYS / WARPS };
static const int NONE = 0x7fffffff;

struct Params {
    const u16 *q, *k, *v;
    u16* out;
    const int *q_order, *q_offsets, *tile_ends, *k_order, *k_offsets;
    const signed char* block_map;
    int *ids, *ends, *shifts, *first_rank, *n_selected, *n_filled, *n_keys;
    const float* text_bias;                  // in units of the products: divided by the scale; 0 for none
    const u16 *tail_keys, *tail_values;      // 0 for no tail
    const float* tail_biases;                // likewise
    i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n;
    float scale;                             // of the products, log2(e) included
    int heads, n_video, video_start, n_text, c_q, c_k, tiles, rest, full;
};

KERNEL void svg2_plan(PARAMETER Params p) {
    SHARED_MEMORY;
    plan<KEYS>(p, smem);
}

// What is known of the slot of the tile that is being looked up: the ends of up to 64 clusters from rank `first` on, of
// which this lane holds two.
struct Ends {
    int first, low, high;
};

enum Kind { SELECTED, TEXT, VIRTUAL, NO_TILE };

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
    int row, at;       // of (batch, head); of (batch, head, query cluster)
    int lane, warp, selected, filled, keys, key_tiles, text_tiles, tiles;

    DEVICE_METHOD int* turn_rows(int t) { return (int*)(smem + Q_BYTES + 4 * STAGE + t % 3 * TURN); }
    DEVICE_METHOD float* turn_biases(int t) { return (float*)(turn_rows(t) + KEYS); }
    DEVICE_METHOD int* tokens() { return (int*)(smem + Q_BYTES + 4 * STAGE + 3 * TURN); }
    // Rows are 16-byte chunks, exchanged so that eight rows of one chunk lie in different banks.
    DEVICE_METHOD u32 chunk(u32 start, int row, int c) { return start + row * ROW_BYTES + ((c ^ (row & 7)) << 4); }
    // From the place of chunk 0 or 1 of a row to that of the chunk 2 d further: rows are multiples of 128 bytes, so it
    // takes one operation and no register of its own.
    DEVICE_METHOD u32 further(u32 place, int d) { return (place ^ ((d & 3) << 5)) + (d >> 2) * 128; }

    // A tile's rows are looked up in three steps with products between them, so that no warp waits for what it loads:
    // the ends of clusters; then each slot's place in the key order (or in the text, or the virtual key's cluster); then
    // the token. Each warp looks up SLOTS_PER_WARP of them, twice over.
    DEVICE_METHOD Kind kind_of(int t) {
        return t < key_tiles ? SELECTED : t < key_tiles + text_tiles ? TEXT : t < tiles ? VIRTUAL : NO_TILE;
    }
    DEVICE_METHOD int own_slot() { return warp * SLOTS_PER_WARP + (lane & (SLOTS_PER_WARP - 1)); }

    DEVICE_METHOD Ends look_at_ends(int t) {
        Ends e = {0, NONE, NONE};
        if (kind_of(t) == SELECTED) {
            e.first = p.first_rank[(i64)at * p.tiles + t];
            const int* ends = p.ends + (i64)at * p.c_k + e.first;
            if (e.first + lane < selected) e.low = ends[lane];
            if (e.first + 32 + lane < selected) e.high = ends[32 + lane];
        }
        return e;
    }

    DEVICE_METHOD int look_up_place(int t, Ends e) {
        const Kind kind = kind_of(t);
        if (kind == SELECTED) {
            const int slot = t * KEYS + own_slot();
            // As many clusters lie before the slot as end at or before it: at most 63 of those in hand, for none is empty.
            int before = 0;
            for (int step = 32; step > 0; step >>= 1) {
                const int i = before + step - 1, low = shuffle(e.low, i & 31), high = shuffle(e.high, i & 31);
                if ((i < 32 ? low : high) <= slot) before += step;
            }
            return slot < keys ? slot + p.shifts[(i64)at * p.c_k + e.first + before] : -1;
        }
        if (kind == TEXT) {
            const int slot = (t - key_tiles) * KEYS + own_slot();
            return slot < p.n_text ? slot : -1;
        }
        const int rank = selected + (t - key_tiles - text_tiles) * KEYS + own_slot();
        return kind == VIRTUAL && rank < filled ? p.ids[(i64)at * p.c_k + rank] : -1;
    }

    // The row of keys and values at a place, and the bias of its logits.
    DEVICE_METHOD int look_up_row(int t, int place, float& bias) {
        bias = -__int_as_float(0x7f800000);
        if (place < 0) return -1;
        const Kind kind = kind_of(t);
        if (kind == SELECTED) {
            bias = 0.0f;
            return p.k_order[(i64)row * p.n_video + place] + p.video_start;
        }
        if (kind == TEXT) {
            bias = p.text_bias ? p.text_bias[(i64)(row / p.heads) * p.n_text + place] : 0.0f;
            return place < p.video_start ? place : place + p.n_video;
        }
        bias = p.tail_biases[(i64)row * p.c_k + place];
        return place;
    }

    DEVICE_METHOD void keep_row(int t, int found, float bias) {
        if (lane < SLOTS_PER_WARP) turn_rows(t)[own_slot()] = found, turn_biases(t)[own_slot()] = bias;
    }

    // Copy the keys and values of tile t, whose rows have been looked up.
    DEVICE_METHOD void copy_tile(int t) {
        const bool real = t < key_tiles + text_tiles;
        const i64 tail = (i64)row * p.c_k * D;
        const u16 *from_k = real ? k : p.tail_keys + tail, *from_v = real ? v : p.tail_values + tail;
        const i64 k_n = real ? p.k_n : D, v_n = real ? p.v_n : D;
        u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE, vs = ks + STAGE;
        const int c = thread() % CHUNKS, *rows = turn_rows(t);
        for (int r = thread() / CHUNKS; r < KEYS; r += THREADS / CHUNKS) {
            i64 token = rows[r];
            bool valid = token >= 0;
            token = valid ? token : 0;
            copy16(chunk(ks, r, c), from_k + token * k_n + c * 8, valid);
            copy16(chunk(vs, r, c), from_v + token * v_n + c * 8, valid);
        }
    }

    DEVICE_METHOD void copy_queries(int begin, int end, const u16* q) {
        for (int r = thread(); r < ROWS; r += THREADS)
            tokens()[r] = begin + r < end ? p.q_order[(i64)row * p.n_video + begin + r] + p.video_start : -1;
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
        // Which cluster this tile belongs to: as many clusters end at or before it.
        const int* tile_ends = p.tile_ends + (i64)row * p.c_q;
        int cluster = 0, above = p.c_q;
        while (cluster < above) {
            int middle = (cluster + above) >> 1;
            if (tile_ends[middle] <= block_x()) cluster = middle + 1;
            else above = middle;
        }
        if (cluster >= p.c_q) return;
        const int tile = block_x() - (cluster > 0 ? tile_ends[cluster - 1] : 0);
        at = row * p.c_q + cluster;
        int begin = p.q_offsets[(i64)row * (p.c_q + 1) + cluster];
        const int end = p.q_offsets[(i64)row * (p.c_q + 1) + cluster + 1];
        if (p.rest) begin += (end - begin) / p.full * p.full;
        begin += tile * ROWS;

        const i64 batch = row / p.heads, head = row % p.heads;
        k = p.k + batch * p.k_b + head * p.k_h, v = p.v + batch * p.v_b + head * p.v_h;
        selected = p.n_selected[at], filled = p.n_filled[at], keys = p.n_keys[at];
        key_tiles = (keys + KEYS - 1) / KEYS, text_tiles = (p.n_text + KEYS - 1) / KEYS;
        const int tail_tiles = p.tail_keys ? (filled - selected + KEYS - 1) / KEYS : 0;
        tiles = key_tiles + text_tiles + tail_tiles;

        float bias;
        for (int t = 0; t < 2; t++) {
            const int found = look_up_row(t, look_up_place(t, look_at_ends(t)), bias);
            keep_row(t, found, bias);
        }
        int place = look_up_place(2, look_at_ends(2));
        copy_queries(begin, end, p.q + batch * p.q_b + head * p.q_h);  // and a barrier, after which the rows can be read
        if (tiles > 0) copy_tile(0);
        copies_end();

        float acc[M][D / 8][4], peak[M][2], total[M][2];
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < D / 8; i++) for (int j = 0; j < 4; j++) acc[m][i][j] = 0.0f;
            for (int i = 0; i < 2; i++) peak[m][i] = -1e30f, total[m][i] = 0.0f;  // finite: a masked tile must not make NaN
        }
        for (int t = 0; t < tiles; t++) {
            // Tile t has come, and nobody reads the tile before it any more.
            copies_wait();
            sync_block();
            if (t + 1 < tiles) copy_tile(t + 1);
            copies_end();
            const int found = look_up_row(t + 2, place, bias);
            Ends ends;
            NOT_UNROLLED for (int part = 0; part < KEYS; part += PART) {
                float logits[M][PART / 8][4];
                products(logits, t, part);
                if (part == 0) keep_row(t + 2, found, bias), ends = look_at_ends(t + 3);
                softmax(logits, acc, peak, total, t, part, t < keys / KEYS);
                if (part + PART == KEYS) place = look_up_place(t + 3, ends);
                weighted(acc, logits, t, part);
            }
        }
        store(acc, total, p.out + batch * p.o_b + head * p.o_h);
    }

    // logits = q k^T of tile t. A thread holds rows lane / 4 and 8 below it, columns 2 (lane % 4) and the next, of each 16 x 8.
    DEVICE_METHOD void products(float (&logits)[M][PART / 8][4], int t, int part) {
        const u32 ks = base + Q_BYTES + (t & 1) * 2 * STAGE + part * ROW_BYTES;
        const u32 q_place = chunk(base, warp * M * 16 + (lane & 15), lane >> 4);
        const u32 k_place = chunk(ks, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int n = 0; n < PART / 8; n++)
                UNROLL for (int j = 0; j < 4; j++) logits[m][n][j] = 0.0f;
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
                               float (&total)[M][2], int t, int part, bool plain) {
        if (!plain) {
            const float* biases = turn_biases(t) + part;
            UNROLL for (int n = 0; n < PART / 8; n++)
                UNROLL for (int j = 0; j < 2; j++) {
                    float bias = biases[n * 8 + (lane & 3) * 2 + j];
                    UNROLL for (int m = 0; m < M; m++) logits[m][n][j] += bias, logits[m][n][2 + j] += bias;
                }
        }
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
                if (any_in_warp(fade != 1.0f))  // seldom, after the first few tiles
                    UNROLL for (int n = 0; n < D / 8; n++) acc[m][n][2 * i] *= fade, acc[m][n][2 * i + 1] *= fade;
            }
    }

    // acc += weights v of tile t.
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
    DEVICE_METHOD void store(float (&acc)[M][D / 8][4], float (&total)[M][2], u16* out) {
        sync_warp();
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 2; i++) {
                float sum = total[m][i];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                const float inverse = 1.0f / sum;
                const int r = (warp * M + m) * 16 + (lane >> 2) + 8 * i;
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

#define ATTENTION(T, D, ROWS)                                      \
    KERNEL void svg2_attention_##T##_##D##_##ROWS(PARAMETER Params p) {      \
        SHARED_MEMORY;                                             \
        Program<T, D, ROWS> program{p, smem};                      \
        program.run();                                             \
    }
ATTENTION(bf16, 128, 128)
ATTENTION(bf16, 128, 64)
ATTENTION(fp16, 128, 128)
ATTENTION(fp16, 128, 64)
ATTENTION(bf16, 64, 128)
ATTENTION(bf16, 64, 64)
ATTENTION(fp16, 64, 128)
ATTENTION(fp16, 64, 64)
