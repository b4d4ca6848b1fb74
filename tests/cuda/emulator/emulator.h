// cuda/warp.cuh on a CPU: the kernel sources, unchanged, run with one fiber for each thread of a block.
//
// A warp's instructions are written down here from the PTX manual's tables (which lane holds which element), so that a
// wrong fragment, a missing barrier or a copy that is read too early shows. Shared memory and the targets of copies that
// have not been waited for are NaN. Every address is checked; bank conflicts of matrix loads are counted.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>
#include <vector>

#define DEVICE static inline
#define DEVICE_METHOD inline
#define UNROLL
#define NOT_UNROLLED
#define KERNEL extern "C"
#define PARAMETER const
#define SHARED_MEMORY unsigned char* smem = emulator::shared

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
struct uint4 {
    u32 x, y, z, w;
};

namespace emulator {

enum { LANES = 32, STACK = 1 << 16 };
static const u32 START = 1024;  // of shared memory, as if the driver kept the bytes before

struct Copy {
    u32 to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t begin;
    jmp_buf here;
    bool started, done;
    std::vector<Copy> pending;
    std::deque<std::vector<Copy>> committed;
    unsigned collectives, barriers;
    std::vector<unsigned char> stack;
};

struct Warp {
    unsigned char slots[2][LANES][64];
    unsigned arrived, generation;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static unsigned char* shared;
static u32 shared_bytes;
static int threads, now, at_x, at_y, living, blocks;
static unsigned block_arrived, block_generation;
static unsigned progress;  // counts what may let others go on, beside barriers of blocks and warps
static long conflicts;
static jmp_buf scheduler, failure;
static char message[256];
static void (*body)();

// What warpgroup.h wants to know of, to find races; nobody else listens. Of all lanes of a warp, or the whole block (-1).
static void (*comes)(int warp), (*goes)(int warp), (*copy_begins)(u32 to), (*copy_ends)(u32 to), (*block_begins)();

[[noreturn]] static void fail(const char* what) {
    snprintf(message, sizeof message, "thread %d of block (%d, %d): %s", now, at_x, at_y, what);
    _longjmp(failure, 1);
}

static void yield() {
    if (!_setjmp(fibers[now].here)) _longjmp(scheduler, 1);
}

static void entry() {
    body();
    fibers[now].done = true;
    living--;
    _longjmp(scheduler, 1);
}

static void block_barrier() {
    const unsigned generation = block_generation;
    if (++block_arrived == (unsigned)threads) block_arrived = 0, block_generation++;
    else while (block_generation == generation) yield();
}

// What each lane of the warp has put in at this collective operation; valid until the next but one.
static const unsigned char (*exchange(const void* mine, size_t bytes))[64] {
    Warp& warp = warps[now / LANES];
    unsigned char(*slots)[64] = warp.slots[fibers[now].collectives++ & 1];
    memcpy(slots[now % LANES], mine, bytes);
    const unsigned generation = warp.generation;
    if (++warp.arrived == LANES) warp.arrived = 0, warp.generation++;
    else while (warp.generation == generation) yield();
    return slots;
}

static unsigned char* shared_at(u32 address, u32 bytes) {
    if (address < START || address + bytes > START + shared_bytes) fail("shared memory out of bounds");
    if (address % bytes) fail("misaligned shared memory");
    return shared + (address - START);
}

// Run a block: every fiber until it waits, again and again. False if nobody can go on.
static bool run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.started = f.done = false, f.collectives = 0;
        f.pending.clear(), f.committed.clear();
    }
    memset(shared, 0xff, shared_bytes);
    for (Warp& w : warps) w.arrived = 0;
    block_arrived = 0, living = threads;
    if (block_begins) block_begins();
    volatile int i = 0, idle = 0;
    while (living > 0) {
        now = i;
        i = (i + 1) % threads;
        Fiber& f = fibers[now];
        if (f.done) continue;
        const unsigned before = block_generation + warps[now / LANES].generation + block_arrived + warps[now / LANES].arrived + progress + threads - living;
        if (!_setjmp(scheduler)) {
            if (f.started) _longjmp(f.here, 1);
            f.started = true;
            setcontext(&f.begin);
        }
        const unsigned after = block_generation + warps[now / LANES].generation + block_arrived + warps[now / LANES].arrived + progress + threads - living;
        idle = before == after ? idle + 1 : 0;
        if (idle > 2 * threads) return false;
    }
    return true;
}

static void prepare(int count, u32 bytes) {
    threads = count, shared_bytes = bytes;
    if ((int)fibers.size() != count) fibers = std::vector<Fiber>(count);
    warps.resize((count + LANES - 1) / LANES);
    shared = (unsigned char*)aligned_alloc(1024, (bytes + 1023) / 1024 * 1024);
    for (Fiber& f : fibers) {
        f.stack.resize(STACK);
        getcontext(&f.begin);
        f.begin.uc_stack.ss_sp = f.stack.data(), f.begin.uc_stack.ss_size = STACK, f.begin.uc_link = nullptr;
        makecontext(&f.begin, entry, 0);
    }
}

static float from_bf16(u16 x) {
    u32 bits = (u32)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static u16 to_bf16(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static float from_fp16(u16 x) {
    static std::vector<float> all;  // a conversion by hand is slow where the processor has none
    if (all.empty())
        for (u32 i = 0; i < 65536; i++) {
            const u16 bits = i;
            _Float16 y;
            memcpy(&y, &bits, 2);
            all.push_back(y);
        }
    return all[x];
}
static u16 to_fp16(float x) {
    _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
}

}  // namespace emulator

struct bf16 {
    static float read(u16 x) { return emulator::from_bf16(x); }
    static u16 write(float x) { return emulator::to_bf16(x); }
};
struct fp16 {
    static float read(u16 x) { return emulator::from_fp16(x); }
    static u16 write(float x) { return emulator::to_fp16(x); }
};

DEVICE int thread() { return emulator::now; }
DEVICE int block_x() { return emulator::at_x; }
DEVICE int block_y() { return emulator::at_y; }
DEVICE void sync_block() {
    if (emulator::comes) emulator::comes(-1);
    emulator::block_barrier();
    if (emulator::goes) emulator::goes(-1);
}
DEVICE void sync_warp() {
    if (emulator::comes) emulator::comes(emulator::now / emulator::LANES);
    emulator::exchange("", 1);
    if (emulator::goes) emulator::goes(emulator::now / emulator::LANES);
}
DEVICE int shuffle(int value, int lane) {
    int got;
    memcpy(&got, emulator::exchange(&value, 4)[lane & 31], 4);
    return got;
}
DEVICE float shuffle_xor(float value, int mask) {
    float got;
    memcpy(&got, emulator::exchange(&value, 4)[(emulator::now & 31) ^ mask], 4);
    return got;
}
DEVICE bool any_in_warp(bool value) {
    const unsigned char(*all)[64] = emulator::exchange(&value, 1);
    bool any = false;
    for (int i = 0; i < 32; i++) any |= all[i][0] != 0;
    return any;
}
DEVICE u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - emulator::shared) + emulator::START; }

DEVICE void copy16(u32 to, const void* from, bool valid) {
    if ((uintptr_t)from % 16) emulator::fail("a copy from an address that is no multiple of 16");
    memset(emulator::shared_at(to, 16), 0xff, 16);
    if (emulator::copy_begins) emulator::copy_begins(to);
    emulator::fibers[emulator::now].pending.push_back({to, from, valid});
}
DEVICE void copies_end() {
    emulator::Fiber& f = emulator::fibers[emulator::now];
    f.committed.push_back(std::move(f.pending));
    f.pending.clear();
}
static void copies_wait_for_all_but(size_t groups) {
    emulator::Fiber& f = emulator::fibers[emulator::now];
    while (f.committed.size() > groups) {
        for (const emulator::Copy& c : f.committed.front()) {
            c.valid ? memcpy(emulator::shared_at(c.to, 16), c.from, 16) : memset(emulator::shared_at(c.to, 16), 0, 16);
            if (emulator::copy_ends) emulator::copy_ends(c.to);
        }
        f.committed.pop_front();
    }
}
DEVICE void copies_wait() { copies_wait_for_all_but(0); }

static void load_matrices_of(u32 (&r)[4], u32 address, bool transposed) {
    const unsigned char(*all)[64] = emulator::exchange(&address, 4);
    const int lane = emulator::now & 31;
    for (int m = 0; m < 4; m++) {
        u32 rows[8], banks = 0;
        for (int i = 0; i < 8; i++) {
            memcpy(&rows[i], all[8 * m + i], 4);
            banks |= 1u << (rows[i] / 16 % 8);
        }
        if (lane == 0 && banks != 0xff) emulator::conflicts++;
        const int g = lane / 4, t = lane % 4;
        u16 pair[2];
        for (int i = 0; i < 2; i++) {
            const int row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
            memcpy(&pair[i], emulator::shared_at(rows[row], 16) + 2 * column, 2);
        }
        memcpy(&r[m], pair, 4);
    }
}
DEVICE void load_matrices(u32 (&r)[4], u32 address) { load_matrices_of(r, address, false); }
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) { load_matrices_of(r, address, true); }

template <class T>
static void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
    u16 mine[12];
    memcpy(mine, a, 16), memcpy(mine + 8, &b0, 4), memcpy(mine + 10, &b1, 4);
    const unsigned char(*all)[64] = emulator::exchange(mine, sizeof mine);
    const int g = (emulator::now & 31) / 4, t = emulator::now % 4;
    // a lane holds of A: rows lane / 4 and + 8, columns 2 (lane % 4) and + 8, two each; of B the same of rows, one column.
    auto at_a = [&](int row, int k) {
        u16 x;
        memcpy(&x, all[row % 8 * 4 + k % 8 / 2] + 2 * (row / 8 * 2 + k / 8 * 4 + k % 2), 2);
        return T::read(x);
    };
    auto at_b = [&](int k, int n) {
        u16 x;
        memcpy(&x, all[n * 4 + k % 8 / 2] + 16 + 2 * (k / 8 * 2 + k % 2), 2);
        return T::read(x);
    };
    for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += at_a(g + i / 2 * 8, k) * at_b(k, 2 * t + i % 2);
        c[i] += sum;
    }
}

template <class T>
static u32 pack(float low, float high, T) {
    return (u32)T::write(low) | (u32)T::write(high) << 16;
}
DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float log2_fast(float x) { return std::log2(x); }
DEVICE float infinity() { return INFINITY; }
