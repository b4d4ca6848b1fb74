// Common to the near field's kernels: their parameter, and the query tile and key blocks of a program.
// The work list is the Plan of svg2_core/ops/near_field/plan.py.
#pragma once

enum { GRANULE = 16, HIGH = 128 };  // keys of a granule; rows of a high query tile

struct Params {
    const u16 *q, *k, *v;
    u16* out;
    float* logsumexp;                        // [rows][n_queries]
    const int *q_order, *q_offsets;          // [rows][n_queries], [rows][c_q + 1]
    const int *keys, *granule_lists, *granule_counts;  // [rows][granules * GRANULE], [rows][c_q][granules], [rows][c_q]
    const int *tiles, *tile_counts;          // [rows][tile_stride], [rows]; of high query tiles, then of low ones
    int* next_tile;                          // fa3: [rows], a counter: the query tile of a row to fetch next
    const float* text_bias;                  // in units of the products: divided by the scale; 0 for none
    i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n;
    float scale;                             // base-2 scale of the logits: log2(e) included
    int rows, heads, n_queries, q_start, n_video, video_start, n_text, c_q, granules, tile_stride;  // rows: batch rows by heads
};

// A query tile's cluster, its first position in the cluster order, and the cluster's end.
struct QueryTile {
    int cluster, begin, end;
};

DEVICE QueryTile query_tile(const Params& p, int row, int entry) {
    const int cluster = entry >> 16;
    const int* offsets = p.q_offsets + (i64)row * (p.c_q + 1) + cluster;
    return {cluster, offsets[0] + (entry & 65535) * HIGH, offsets[1]};
}

// The key blocks of one query cluster, KEYS a step: its granules, then text.
template <int KEYS>
struct Keys {
    const Params& p;
    int row, cluster_row, granule_count, key_steps, steps;  // rows by (batch, head) and by (batch, head, query cluster)

    DEVICE_METHOD void start(int head_row, int cluster) {
        row = head_row, cluster_row = row * p.c_q + cluster, granule_count = p.granule_counts[cluster_row];
        key_steps = (granule_count + KEYS / GRANULE - 1) / (KEYS / GRANULE);
        // Without any key one step of padding, so that there is a step.
        steps = key_steps + p.n_text > 0 ? key_steps + (p.n_text + KEYS - 1) / KEYS : 1;
    }

    // A column of a key block is looked up in two stages, so that no warp waits for its loads: its granule, later its token.
    DEVICE_METHOD int granule_of(int t, int column) {
        const int index = t * (KEYS / GRANULE) + column / GRANULE;
        return index < granule_count ? p.granule_lists[(i64)cluster_row * p.granules + index] : -1;
    }

    // -1 for padding and for keys of bias -infinity: they are loaded as zeros, and the logit's bias is -infinity.
    DEVICE_METHOD int token_of(int t, int column, int granule, float& bias) {
        const int text = (t - key_steps) * KEYS + column;
        int token = -1;
        bias = 0.0f;
        if (t < key_steps) {
            if (granule >= 0) token = p.keys[((i64)row * p.granules + granule) * GRANULE + column % GRANULE];
            if (token >= 0) token += p.video_start;
        } else if (text < p.n_text) {
            if (p.text_bias) bias = p.text_bias[(i64)(row / p.heads) * p.n_text + text];
            if (bias > -infinity()) token = text < p.video_start ? text : text + p.n_video;
        }
        if (token < 0) bias = -infinity();
        return token;
    }
};

// A lower bound of row sums: a query without a key divides zeros by it.
static const float NO_SUM = 1e-30f;

// Of a query whose weights relative to exp2(row_max * scale) sum to row_sum.
DEVICE float logsumexp_of(float row_max, float row_sum, float scale) {
    return row_sum > 0.0f ? (row_max * scale + log2_fast(row_sum)) * 0.6931471805599453f : -infinity();
}
