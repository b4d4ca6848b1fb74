// cuda/warpgroup.cuh on a CPU, on top of emulator.h: written from the tables of the PTX manual, not from the kernels.
//
// Matrix instructions read shared memory through their descriptors when they are issued, and what they add to is NaN
// until it is waited for. Races are found by order, not by luck: each thread has a clock of what it knows of every
// other (vector clocks, one entry per thread, exchanged at barriers). Each word of shared memory knows who wrote and
// read it when, so that an access which no barrier orders behind the last one fails, in whatever sequence the fibers
// happen to run.
#pragma once

#include "emulator.h"

#include <algorithm>
#include <map>
#include <memory>

#define WARPGROUP_KERNEL(THREADS) extern "C"
#define SWIZZLED_SHARED_MEMORY unsigned char* smem = emulator::shared

typedef unsigned long long u64;

namespace emulator {

enum { WARPGROUP_LANES = 128, MOST_WARPGROUPS = 3, MOST_ITEMS = 3 };

typedef std::vector<u32> Clock;

struct Meeting {  // a barrier of any kind
    int count, arrived;
    unsigned phase;
    Clock gathering, ended[2];
};

struct Read {
    int thread;
    u32 epoch;
};

struct Word {
    int writer, product[MOST_WARPGROUPS];  // the last matrix instruction of each warpgroup that reads it; -1 for none
    u32 epoch;
    bool pending, fenced;  // a copy on its way; readable by matrix instructions
    std::vector<Read> reads;
};

struct Product {  // a matrix instruction of a warpgroup
    u64 a, b;
    int columns, issued, waited;
    bool a_in_registers, b_rows_are_summed, add;
    u32 fragments[WARPGROUP_LANES][4], done[WARPGROUP_LANES];
    std::vector<float> sums;  // [64][columns]
};

struct Issued {  // the same as one thread knows it
    Product* product;
    float* d;
    const u32* a;
};

struct Sums {
    std::vector<float> values;
    int under_way;
};

struct Thread {
    Clock clock;
    bool registers_fenced;
    size_t issued;
    std::vector<Issued> open;
    std::deque<std::vector<Issued>> groups;
    std::map<float*, Sums> sums;
    std::vector<u32> unfenced;
};

static std::vector<Thread> state;
static std::vector<Word> words;
static std::vector<Clock> warp_clocks;
static Clock block_clock;
static std::map<u32, Meeting> barriers;
static Meeting named[16];
static std::vector<std::unique_ptr<Product>> products[MOST_WARPGROUPS];
static int items_taken;

static void learn(const Clock& from) {
    Clock& own = state[now].clock;
    for (size_t i = 0; i < from.size(); i++) own[i] = std::max(own[i], from[i]);
}
static void publish(Clock& to) {
    to.resize(threads);
    Clock& own = state[now].clock;
    for (int i = 0; i < threads; i++) to[i] = std::max(to[i], own[i]);
    own[now]++;
}
static u32 epoch() { return state[now].clock[now]; }

static void start_over() {
    state.assign(threads, Thread());
    for (int i = 0; i < threads; i++) state[i].clock.assign(threads, 0), state[i].clock[i] = 1;
    Word empty = {};
    empty.writer = -1;
    std::fill(empty.product, empty.product + MOST_WARPGROUPS, -1);
    words.assign(shared_bytes / 4, empty);
    warp_clocks.assign(warps.size(), Clock());
    block_clock.clear(), barriers.clear();
    for (Meeting& m : named) m = Meeting();
    for (auto& of_group : products) of_group.clear();
    items_taken = 0;
}

// What every thread brings is known to all that leave; those who come again early only make it more.
static void come(int warp) { publish(warp < 0 ? block_clock : warp_clocks[warp]); }
static void go(int warp) { learn(warp < 0 ? block_clock : warp_clocks[warp]); }

static Word& word_at(u32 address) { return words[(address - START) / 4]; }

static void check_write(u32 address) {
    Word& w = word_at(address);
    const Clock& own = state[now].clock;
    if (w.pending) fail("a write to where a copy is on its way");
    if (w.writer >= 0 && own[w.writer] < w.epoch) fail("a race of two writes to shared memory");
    for (const Read& r : w.reads)
        if (own[r.thread] < r.epoch) fail("shared memory is written before somebody has read it");
    for (int g = 0; g < MOST_WARPGROUPS; g++) {
        if (w.product[g] < 0) continue;
        const Product& product = *products[g][w.product[g]];
        for (int i = 0; i < WARPGROUP_LANES; i++)
            if (!product.done[i] || own[g * WARPGROUP_LANES + i] < product.done[i])
                fail("shared memory is written before a matrix instruction is known to have read it");
        w.product[g] = -1;
    }
    w.reads.clear();
    w.writer = now, w.epoch = epoch(), w.fenced = false;
}

static void check_known(u32 address) {
    const Word& w = word_at(address);
    if (w.pending) fail("shared memory is read while a copy to it is on its way");
    if (w.writer < 0) fail("shared memory is read that nobody has written");
    if (state[now].clock[w.writer] < w.epoch) fail("shared memory is read before it is known to be written");
}
static void check_read(u32 address) {
    check_known(address);
    word_at(address).reads.push_back({now, epoch()});
}

static void copy_starts(u32 to) {
    for (int i = 0; i < 16; i += 4) check_write(to + i), word_at(to + i).pending = true;
}
static void copy_is_there(u32 to) {
    for (int i = 0; i < 16; i += 4) {
        Word& w = word_at(to + i);
        w.pending = false, w.epoch = epoch();
        state[now].unfenced.push_back(to + i);
    }
}

static const bool listening = [] {
    comes = come, goes = go, copy_begins = copy_starts, copy_ends = copy_is_there, block_begins = start_over;
    return true;
}();

static void arrive(Meeting& m) {
    publish(m.gathering);
    progress++;
    if (++m.arrived < m.count) return;
    m.ended[m.phase & 1].swap(m.gathering);
    m.gathering.clear();
    m.arrived = 0, m.phase++;
}

static Meeting& barrier_at(u32 address) {
    if (address % 8) fail("a misaligned barrier");
    auto found = barriers.find(address);
    if (found == barriers.end()) fail("no barrier was made here");
    check_known(address);
    return found->second;
}

static Meeting& named_at(int name, int count) {
    if (name < 1 || name > 15 || count % LANES) fail("there is no such named barrier");
    Meeting& m = named[name];
    if (m.arrived && m.count != count) fail("a named barrier of two sizes");
    m.count = count;
    return m;
}

// Where an element lies: the canonical layouts with 128-byte swizzling, in bytes for elements of two (T = 8 of them are
// 16 bytes). K-major ((8,m),(T,2k)):((8T,SBO),(1,T)); MN-major ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)); Swizzle<3,4,3>
// exchanges bits 4 to 6 of the address by bits 7 to 9.
static u32 element_at(u64 matrix, int mn, int k, bool k_major) {
    const u32 start = (matrix & 0x3fff) << 4;
    const u32 leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
    const u32 offset = k_major ? mn % 8 * 128 + mn / 8 * stride + k % 8 * 2 + k / 8 * 16
                               : mn % 8 * 2 + mn / 8 % 8 * 16 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride;
    const u32 address = start + offset;
    return address ^ (address >> 7 & 7) << 4;
}

static void check_matrix(u64 matrix) {
    if (matrix >> 62 != 1) fail("only 128-byte swizzling is emulated");
    if (matrix >> 49 & 7) fail("a base offset is not emulated");
    if (((matrix & 0x3fff) << 4) >> 7 & 7) fail("a matrix whose swizzle pattern begins elsewhere needs a base offset");
    if (matrix & 0x3e00c000c000c000ull) fail("a descriptor with unused bits");
}

static void read_matrix(Product& p, u64 matrix, int size, bool k_major, bool first) {
    const int group = now / WARPGROUP_LANES, index = (int)state[now].issued - 1;
    for (int mn = 0; mn < size; mn++)
        for (int k = 0; k < 16; k++) {
            const u32 address = element_at(matrix, mn, k, k_major);
            shared_at(address, 2);
            if (k_major ? k % 2 : mn % 2) continue;
            Word& w = word_at(address);
            if (w.pending) fail("a matrix instruction reads where a copy is on its way");
            if (w.writer < 0) fail("a matrix instruction reads what nobody has written");
            if (state[now].clock[w.writer] < w.epoch)
                fail("a matrix instruction reads what it does not know to be written");
            if (!w.fenced) fail("a matrix instruction reads what was written without a fence");
            if (first) w.product[group] = index;
        }
}

template <class T>
static void multiply_all(Product& p) {
    std::vector<float> a(64 * 16), b(16 * p.columns);
    auto at = [](u64 matrix, int mn, int k, bool k_major) {
        u16 x;
        memcpy(&x, shared_at(element_at(matrix, mn, k, k_major), 2), 2);
        return T::read(x);
    };
    for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++) {
            if (p.a_in_registers) {
                // A lane has rows lane / 4 and 8 below it of its warp's 16, columns 2 (lane % 4) and the next, and 8
                // further.
                const u32 pair = p.fragments[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][m % 16 / 8 + k / 8 * 2];
                a[m * 16 + k] = T::read(pair >> k % 2 * 16);
            } else {
                a[m * 16 + k] = at(p.a, m, k, true);
            }
        }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < p.columns; n++) b[k * p.columns + n] = at(p.b, n, k, !p.b_rows_are_summed);
    p.sums.assign(64 * p.columns, 0.0f);
    for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++) {
            const float x = a[m * 16 + k], *y = &b[k * p.columns];
            float* sums = &p.sums[m * p.columns];
            for (int n = 0; n < p.columns; n++) sums[n] += x * y[n];
        }
}

template <class T>
static void issue(float* d, int columns, const u32* fragment, u64 a, u64 b, bool b_rows_are_summed, bool add, T) {
    Thread& own = state[now];
    const int lane = now % WARPGROUP_LANES;
    auto& of_group = products[now / WARPGROUP_LANES];
    if (!own.registers_fenced) fail("a matrix instruction without a fence before it");
    if (own.issued == of_group.size()) {
        of_group.emplace_back(new Product());
        Product& p = *of_group.back();
        p.a = a, p.b = b, p.columns = columns, p.add = add;
        p.a_in_registers = fragment, p.b_rows_are_summed = b_rows_are_summed;
        if (!fragment) check_matrix(a);
        check_matrix(b);
    }
    Product& p = *of_group[own.issued++];
    if (p.a != a || p.b != b || p.columns != columns || p.add != add || p.a_in_registers != (fragment != nullptr))
        fail("a warpgroup's threads do not issue the same matrix instruction");
    // What a warp may read, one of its lanes finds out: another each time.
    if (now % LANES == (int)(own.issued % LANES)) {
        if (!fragment) read_matrix(p, a, 64, true, true);
        read_matrix(p, b, columns, !b_rows_are_summed, true);
    }
    if (fragment) memcpy(p.fragments[lane], fragment, 16);
    Sums& sums = own.sums[d];
    if (sums.under_way++ == 0) {
        sums.values.assign(d, d + columns / 2);
        std::fill(d, d + columns / 2, NAN);
    }
    own.open.push_back({&p, d, fragment});
    if (++p.issued == WARPGROUP_LANES) multiply_all<T>(p), progress++;
}

static void wait_for_products(size_t groups) {
    Thread& own = state[now];
    const int lane = now % WARPGROUP_LANES, warp = lane / 32, g = lane % 32 / 4, t = lane % 4;
    if (!own.open.empty()) fail("matrix instructions that belong to no group are waited for");
    for (; own.groups.size() > groups; own.groups.pop_front())
        for (const Issued& issued : own.groups.front()) {
            Product& p = *issued.product;
            while (p.issued < WARPGROUP_LANES) yield();
            if (issued.a && memcmp(issued.a, p.fragments[lane], 16))
                fail("registers changed under a matrix instruction");
            Sums& sums = own.sums[issued.d];
            for (int i = 0; i < p.columns / 2; i++) {
                const float product = p.sums[(16 * warp + g + i / 2 % 2 * 8) * p.columns + i / 4 * 8 + 2 * t + i % 2];
                sums.values[i] = p.add ? sums.values[i] + product : product;
            }
            if (--sums.under_way == 0) std::copy(sums.values.begin(), sums.values.end(), issued.d);
            p.done[lane] = epoch();
            if (++p.waited == WARPGROUP_LANES) std::vector<float>().swap(p.sums);
        }
    own.registers_fenced = false;
}

}  // namespace emulator

template <int COUNT>
DEVICE void give_registers() {
    static_assert(COUNT % 8 == 0 && 24 <= COUNT && COUNT <= 256, "");
}
template <int COUNT>
DEVICE void take_registers() {
    give_registers<COUNT>();
}

DEVICE int warp_index() { return emulator::now / emulator::LANES; }
DEVICE float reciprocal(float x) { return 1.0f / x; }

// Blocks run one after another here. Each but the last takes a few items and leaves the others, as if it had been slow.
DEVICE int take_next(int* counter) {
    if (emulator::at_x + 1 < emulator::blocks && emulator::items_taken++ >= emulator::MOST_ITEMS) return 0x7ffffff0;
    return (*counter)++;
}

template <class V>
static void store_shared_value(u32 to, V value) {
    emulator::check_write(to);
    memcpy(emulator::shared_at(to, 4), &value, 4);
}
template <class V>
static V load_shared_value(u32 from) {
    V value;
    memcpy(&value, emulator::shared_at(from, 4), 4);
    emulator::check_read(from);
    return value;
}
DEVICE void store_shared(u32 to, int value) { store_shared_value(to, value); }
DEVICE void store_shared(u32 to, float value) { store_shared_value(to, value); }
DEVICE int load_shared_int(u32 from) { return load_shared_value<int>(from); }
DEVICE float load_shared_float(u32 from) { return load_shared_value<float>(from); }

DEVICE void barrier_init(u32 barrier, int count) {
    emulator::shared_at(barrier, 8);
    emulator::check_write(barrier);
    emulator::barriers[barrier] = emulator::Meeting();
    emulator::barriers[barrier].count = count;
}
DEVICE void barrier_arrive(u32 barrier) { emulator::arrive(emulator::barrier_at(barrier)); }
DEVICE bool barrier_passed(u32 barrier, int parity) {
    const emulator::Meeting& m = emulator::barrier_at(barrier);
    if ((int)(m.phase & 1) == parity) return false;
    emulator::learn(m.ended[parity]);
    return true;
}
DEVICE void barrier_wait(u32 barrier, int parity) {
    while (!barrier_passed(barrier, parity)) emulator::yield();
}

DEVICE void named_arrive(int name, int threads) { emulator::arrive(emulator::named_at(name, threads)); }
DEVICE void named_wait(int name, int threads) {
    emulator::Meeting& m = emulator::named_at(name, threads);
    const unsigned phase = m.phase;
    emulator::arrive(m);
    while (m.phase == phase) emulator::yield();
    emulator::learn(m.ended[phase & 1]);
}

template <int GROUPS>
DEVICE void copies_wait_but() {
    copies_wait_for_all_but(GROUPS);
}
DEVICE void fence_for_matrices() {
    for (u32 address : emulator::state[emulator::now].unfenced) {
        emulator::Word& w = emulator::word_at(address);
        if (w.writer == emulator::now && !w.pending) w.fenced = true, w.epoch = emulator::epoch();
    }
    emulator::state[emulator::now].unfenced.clear();
}

DEVICE void matrices_begin() { emulator::state[emulator::now].registers_fenced = true; }
DEVICE void matrices_end() {
    emulator::Thread& own = emulator::state[emulator::now];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}
template <int GROUPS, int N>
DEVICE void matrices_wait(float (&)[N][4]) {
    emulator::wait_for_products(GROUPS);
}

template <class T>
static void multiply_transposed(float (&d)[16][4], u64 a, u64 b, bool add, T type) {
    emulator::issue(d[0], 128, nullptr, a, b, false, add, type);
}
template <class T, int N>
static void multiply_add(float (&d)[N][4], const u32 (&a)[4], u64 b, T type) {
    emulator::issue(d[0], 8 * N, a, 0, b, true, true, type);
}
