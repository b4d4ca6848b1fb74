// Wrappers of PTX instructions of compute capability 9.0: a warpgroup's matrix instructions, barriers in
// shared memory, named barriers, register reallocation between roles. tests/cuda/emulator/warpgroup.h defines the same
// on a CPU.
#pragma once

#include "warp.cuh"

// One program per multiprocessor: its shared memory leaves no room for a second.
#define WARPGROUP_KERNEL(THREADS) extern "C" __global__ __launch_bounds__(THREADS, 1)
#define SWIZZLED_SHARED_MEMORY extern __shared__ __align__(1024) unsigned char smem[]  // swizzle patterns begin there

typedef unsigned long long u64;

template <int COUNT>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The same for all lanes, in a way that the compiler knows it.
DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE int take_next(int* counter) { return atomicAdd(counter, 1); }

// Shared memory by its address.
DEVICE void store_shared(u32 to, int value) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
DEVICE void store_shared(u32 to, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}
DEVICE int load_shared_int(u32 from) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}
DEVICE float load_shared_float(u32 from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
    return value;
}

// A barrier in shared memory: its phase ends with the last of `count` arrivals, and the next begins. Whoever waits for
// the end of a phase sees what was written before its arrivals. Phases are told apart by their parity, 0 for the first;
// the phase before the first counts as ended.
DEVICE void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
DEVICE bool barrier_passed(u32 barrier, int parity) {
    int passed;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
                 : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}
DEVICE void barrier_wait(u32 barrier, int parity) {
    int passed;
    do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
                    : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    while (!passed);
}

// A named barrier of `threads`: some wait, the others only arrive.
DEVICE void named_wait(int name, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
DEVICE void named_arrive(int name, int threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// All but the latest GROUPS groups of this thread's copies have arrived.
template <int GROUPS>
DEVICE void copies_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
// What this thread wrote to shared memory, copies that have arrived included, may be read by matrix instructions, once
// their issuer has synchronised with this thread.
DEVICE void fence_for_matrices() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that matrix instructions are to read or add to have been written.
DEVICE void matrices_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void matrices_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void hold(float (&d)[N][4]) {  // the compiler takes no value of these from before this point
    UNROLL for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
// All but the latest GROUPS groups of matrix instructions are done; `d` is what they left.
template <int GROUPS, int N>
DEVICE void matrices_wait(float (&d)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
    hold(d);
}

// What the text of an instruction with 32 or 64 sums needs: their numbers, and the sums themselves.
#define SVG2_R32                                                      \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"      \
    "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SVG2_R64                                                      \
    SVG2_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"  \
    "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"    \
    "%60,%61,%62,%63"
#define SVG2_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SVG2_D16(i) SVG2_D4(i), SVG2_D4(i + 1), SVG2_D4(i + 2), SVG2_D4(i + 3)
#define SVG2_D32(i) SVG2_D16(i), SVG2_D16(i + 4)

// A warpgroup's products of 64 rows with 16 summed over. A thread holds of the sums d[n] what mma.m16n8k16 gives it of
// columns 8 n and on, for the 16 rows of its warp; likewise of `a` in registers.
#define SVG2_MATRIX_INSTRUCTIONS(T, PTX)                                                                              \
    /* d = a b^T, or d += a b^T: b's rows are the columns of d; both in shared memory, rows of what is summed over */ \
    DEVICE void multiply_transposed(float (&d)[16][4], u64 a, u64 b, bool add, T) {                                   \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX "." PTX\
                     " {" SVG2_R64 "}, %64, %65, p, 1, 1, 0, 0; }"                                                    \
                     : SVG2_D32(0), SVG2_D32(8) : "l"(a), "l"(b), "r"((int)add));                                     \
    }                                                                                                                 \
    /* d += a b: a in registers, b in shared memory, rows of d's columns */                                           \
    DEVICE void multiply_add(float (&d)[16][4], const u32 (&a)[4], u64 b, T) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX "." PTX                                       \
                     " {" SVG2_R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"                                           \
                     : SVG2_D32(0), SVG2_D32(8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                \
    }                                                                                                                 \
    DEVICE void multiply_add(float (&d)[8][4], const u32 (&a)[4], u64 b, T) {                                         \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PTX "." PTX                                        \
                     " {" SVG2_R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"                                           \
                     : SVG2_D32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }
SVG2_MATRIX_INSTRUCTIONS(bf16, "bf16")
SVG2_MATRIX_INSTRUCTIONS(fp16, "f16")
