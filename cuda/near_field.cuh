// What the near field's kernels have in common: their parameter, and which query tile and which keys a program works on.
// The lists they walk through are the Plan of svg2_core/ops/near_field/plan.py.
#pragma once

enum { GRANULE = 16, HIGH = 128 };  // keys of a granule; rows of a high query tile

struct Params {
    const u16 *q, *k, *v;
    u16* out;
    float* logsumexp;                        // [rows][n_queries]
    const int *q_order, *q_offsets;          // [rows][n_queries], [rows][c_q + 1]
    const int *keys, *lists, *counts;        // [rows][granules * GRANULE], [rows][c_q][granules], [rows][c_q]
    const int *tiles, *numbers;              // [rows][most], [rows]; high query tiles, and `rows` further low ones
    int* next;                               // fa3: [rows], the query tile of a row that is taken next
    const float* text_bias;                  // in units of the products: divided by the scale; 0 for none
    i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n;
    float scale;                             // of the products, log2(e) included
    int rows, heads, n_queries, q_start, n_video, video_start, n_text, c_q, granules, most;  // rows: batch rows by heads
};

// A query tile's cluster, and its places in the cluster order as far as that cluster goes.
struct QueryTile {
    int cluster, begin, end;
};

DEVICE QueryTile query_tile(const Params& p, int row, int entry) {
    const int cluster = entry >> 16;
    const int* offsets = p.q_offsets + (i64)row * (p.c_q + 1) + cluster;
    return {cluster, offsets[0] + (entry & 65535) * HIGH, offsets[1]};
}

// The keys of one query cluster, KEYS a step: those of its granules, then text.
template <int KEYS>
struct Keys {
    const Params& p;
    int row, at, count, key_steps, steps;  // row of (batch, head); of (batch, head, query cluster); granules

    DEVICE_METHOD void start(int its_row, int cluster) {
        row = its_row, at = row * p.c_q + cluster, count = p.counts[at];
        key_steps = (count + KEYS / GRANULE - 1) / (KEYS / GRANULE);
        // Without any key one step of padding: what follows need not know.
        steps = key_steps + p.n_text > 0 ? key_steps + (p.n_text + KEYS - 1) / KEYS : 1;
    }

    // A slot of a step is looked up in two parts, so that no warp waits for what it loads: its granule, later its token.
    DEVICE_METHOD int granule_of(int t, int slot) {
        const int which = t * (KEYS / GRANULE) + slot / GRANULE;
        return which < count ? p.lists[(i64)at * p.granules + which] : -1;
    }

    // -1 for padding and for what its bias leaves out: zeros are multiplied in its place, and the logit's bias is -infinity.
    DEVICE_METHOD int token_of(int t, int slot, int granule, float& bias) {
        const int text = (t - key_steps) * KEYS + slot;
        int token = -1;
        bias = 0.0f;
        if (t < key_steps) {
            if (granule >= 0) token = p.keys[((i64)row * p.granules + granule) * GRANULE + slot % GRANULE];
            if (token >= 0) token += p.video_start;
        } else if (text < p.n_text) {
            if (p.text_bias) bias = p.text_bias[(i64)(row / p.heads) * p.n_text + text];
            if (bias > -infinity()) token = text < p.video_start ? text : text + p.n_video;
        }
        if (token < 0) bias = -infinity();
        return token;
    }
};

// Of a query without a key: what takes the place of a sum of zero, and divides no more than zeros.
static const float NO_SUM = 1e-30f;

// Of a query whose weights, relative to exp2(peak * scale), have this sum.
DEVICE float logsumexp_of(float peak, float total, float scale) {
    return total > 0.0f ? (peak * scale + log2_fast(total)) * 0.6931471805599453f : -infinity();
}
