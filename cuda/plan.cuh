// Which keys a query cluster attends to, and where each of them is found: what the attention kernels have in common.
#pragma once

enum { PLAN_THREADS = 128 };

// Lay out the key clusters of one query cluster: the selected ones, then the other non-empty ones. For rank r: ids[r]
// the cluster; for selected ones also ends[r], the slots up to and including it, and shifts[r], what to add to a slot
// to get its place in the key order. first_rank[t], t < tiles: the rank that slot t * SLOTS falls into.
template <int SLOTS, class P>
DEVICE void plan(const P& p, unsigned char* smem) {
    int* counts = (int*)smem;  // of each thread's clusters: selected, their keys, other
    const i64 row = block_y(), at = row * p.c_q + block_x();
    const int per = (p.c_k + PLAN_THREADS - 1) / PLAN_THREADS, first = thread() * per;
    const int* offsets = p.k_offsets + row * (p.c_k + 1);
    const signed char* chosen = p.block_map + at * p.c_k;
    int selected = 0, keys = 0, other = 0;
    for (int c = first; c < first + per && c < p.c_k; c++) {
        int size = offsets[c + 1] - offsets[c];
        if (size > 0 && chosen[c]) selected++, keys += size;
        else if (size > 0) other++;
    }
    counts[thread()] = selected, counts[PLAN_THREADS + thread()] = keys, counts[2 * PLAN_THREADS + thread()] = other;
    sync_block();
    int rank = 0, slot = 0, behind = 0, all_selected = 0, all_keys = 0, all_other = 0;
    for (int i = 0; i < PLAN_THREADS; i++) {
        if (i == thread()) rank = all_selected, slot = all_keys, behind = all_other;
        all_selected += counts[i], all_keys += counts[PLAN_THREADS + i], all_other += counts[2 * PLAN_THREADS + i];
    }
    behind += all_selected;
    for (int c = first; c < first + per && c < p.c_k; c++) {
        int size = offsets[c + 1] - offsets[c];
        if (size <= 0) continue;
        if (!chosen[c]) {
            p.ids[at * p.c_k + behind++] = c;
            continue;
        }
        p.ids[at * p.c_k + rank] = c;
        p.ends[at * p.c_k + rank] = slot + size;
        p.shifts[at * p.c_k + rank] = offsets[c] - slot;
        for (int t = (slot + SLOTS - 1) / SLOTS; t * SLOTS < slot + size; t++) p.first_rank[at * p.tiles + t] = rank;
        rank++, slot += size;
    }
    if (thread() == 0) p.n_selected[at] = all_selected, p.n_filled[at] = all_selected + all_other, p.n_keys[at] = all_keys;
}
