// CUDA C++ on one CPU thread: what kernels/*.cu use of the language, and what runs a grid of theirs.
//
// A thread of a block is a fiber that runs until it meets others: at a barrier, or at a collective of its warp, which
// takes place once every lane named by the mask is there, at the same line and with the same mask, and fails where one
// cannot come. Fibers run in an order of the caller's choice: a block without races gives the same bits in all of them.
// Shared memory is NaN (bytes of 0xff) when a block begins, and static shared memory is all that is thread_local here.
// A segmentation fault ends the grid with a message: memory from emulated.guarded has pages on both sides that fault.

#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's math.h alone: libstdc++'s takes longer to read than a kernel to compile
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local
#define __constant__ static const

struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

// CUDA's min and max: mixed types go to the common one
template <class A, class B> inline auto min(A a, B b) -> decltype(a + b) {
    const decltype(a + b) x = a, y = b;
    return x < y ? x : y;
}
template <class A, class B> inline auto max(A a, B b) -> decltype(a + b) {
    const decltype(a + b) x = a, y = b;
    return x > y ? x : y;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <class To, class From> inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline float __int_as_float(int v) { return same_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
inline int __float_as_int(float v) { return same_bits<int>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }

namespace emulator {

constexpr size_t STACK = 256 << 10, STATIC_SHARED = 48 << 10, ALL_SHARED = 227 << 10;
constexpr unsigned MOST_THREADS = 1024;
enum Order { ASCENDING, DESCENDING, RANDOM };  // RANDOM and above: seeds
enum State { READY, IN_WARP, AT_BARRIER, AT_GATE, DONE };

// What a thread has started and will wait for, in groups; the last one is still open
template <class Item> struct Groups {
    Item *items;
    unsigned held, room, open, total;

    void clear() { held = open = total = 0; }
    void add(const Item &item) {
        if (held == room) items = (Item *)realloc(items, (room = 2 * room + 16) * sizeof item);
        items[held] = item, items[held++].group = open, total++;
    }
    template <class RUN> void wait(unsigned youngest, RUN run) {  // for all closed groups but so many
        unsigned done = 0;
        while (done < held && items[done].group + youngest < open) run(items[done++]);
        held -= done;
        memmove(items, items + done, held * sizeof(Item));
    }
};

struct Copy { char *to; const char *from; bool inside; unsigned group; };
struct Product {
    void (*run)(const Product &);
    float (*c)[4];
    const unsigned *a;
    const char *from;
    int line;
    unsigned group;
};

struct Fiber {
    jmp_buf here;
    bool begun;
    State state;
    unsigned mask;
    int line;
    void *data;
    Groups<Copy> copies;
    Groups<Product> products;
};

inline Fiber fibers[MOST_THREADS];
inline char *stacks;
inline jmp_buf scheduler;
inline ucontext_t first;
inline unsigned current, threads, alive, waiting, passed[16];  // passed: between two warps, by barrier
inline int order, barrier_line;
inline unsigned barrier_all, barrier_any, barrier_count, all_result, any_result, count_result, random_state;
inline void (*kernel)(const void *);
inline const void *argument;
inline char message[400];
inline char *dynamic_begin, *static_begin;
inline unsigned short unpublished[ALL_SHARED / 16];  // of 16 bytes: thread + 1 that copied them, not yet for products
inline size_t dynamic_size, static_size;
inline thread_local char anchor[16];  // so that there is a block of thread_local memory to find

[[noreturn]] inline void fail(const char *format, ...) {
    char text[300];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    snprintf(message, sizeof message, "block %u, thread %u: %s", blockIdx.x, current, text);
    _longjmp(scheduler, 2);
}

__attribute__((noinline)) inline void leave() {
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

inline void open_barrier() {
    all_result = barrier_all, any_result = barrier_any, count_result = barrier_count;
    barrier_all = 1, barrier_any = barrier_count = waiting = 0;
    for (unsigned i = 0; i < threads; i++)
        if (fibers[i].state == AT_BARRIER) fibers[i].state = READY;
}

inline void barrier(bool value, int line) {
    if (!waiting) barrier_line = line;
    if (line != barrier_line) fail("waits at the barrier of line %d, others at that of line %d", line, barrier_line);
    barrier_all &= value, barrier_any |= value, barrier_count += value;
    fibers[current].state = AT_BARRIER, fibers[current].line = line;
    if (++waiting == alive) open_barrier();
    else leave();
}

// run(void **data, mask) takes place once all lanes of the mask have come, with the data of every lane
template <class RUN> inline void collective(unsigned mask, int line, void *data, RUN run) {
    Fiber *warp = fibers + current / 32 * 32, &me = fibers[current];
    if (!(mask >> current % 32 & 1)) fail("is not in its own mask %08x at line %d", mask, line);
    me.state = IN_WARP, me.mask = mask, me.line = line, me.data = data;
    void *all[32] = {};
    bool complete = true;
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber &other = warp[i];
        if (current / 32 * 32 + i >= threads || other.state == DONE)
            fail("waits at line %d for lane %u, which is not there any more", line, i);
        if (other.state == IN_WARP && (other.line != line || other.mask != mask))
            fail("is at line %d with mask %08x, lane %u at line %d with %08x", line, mask, i, other.line, other.mask);
        complete &= other.state == IN_WARP;
        all[i] = other.data;
    }
    if (!complete) return leave();
    run(all, mask);
    for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1) warp[i].state = READY;
}

// Between two warps: one passes on, the other may be waiting for it, or come later
inline void pass_on(int id, int line) {
    collective(~0u, line, 0, [id, line](void **, unsigned) {
        if (passed[id]++) fail("line %d: passes on by barrier %d, which no one has taken over from", line, id);
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].state == AT_GATE && fibers[i].mask == (unsigned)id) fibers[i].state = READY;
    });
}

inline void take_over(int id, int line) {
    collective(~0u, line, 0, [](void **, unsigned) {});
    Fiber &me = fibers[current];
    while (!passed[id]) me.state = AT_GATE, me.mask = id, me.line = line, leave();
    collective(~0u, line, 0, [id](void **, unsigned) { passed[id] = 0; });
}

inline void check_shared(const void *p, size_t bytes, int line) {
    const char *at = (const char *)p;
    if ((uintptr_t)p % bytes) fail("line %d: address %p is not a multiple of %zu", line, p, bytes);
    if (at >= dynamic_begin && at + bytes <= dynamic_begin + dynamic_size) return;
    if (at >= static_begin && at + bytes <= static_begin + static_size) return;
    fail("line %d: an address outside shared memory, %td bytes behind the end of %zu dynamic bytes", line,
         at - (dynamic_begin + dynamic_size), dynamic_size);
}

inline unsigned short *mark_of(const char *at) {
    return at >= dynamic_begin && at < dynamic_begin + dynamic_size ? unpublished + (at - dynamic_begin) / 16 : 0;
}

inline void land(const Copy &copy) {
    if (unsigned short *mark = mark_of(copy.to)) *mark = current + 1;
    if (copy.inside) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
}

inline void fiber_main() {
    for (;;) {
        kernel(argument);
        fibers[current].state = DONE, alive--;
        if (alive && waiting == alive) open_barrier();
        leave();
    }
}

inline void begin() {  // a fiber's first step
    getcontext(&first);
    first.uc_stack.ss_sp = stacks + current * STACK, first.uc_stack.ss_size = STACK;
    makecontext(&first, fiber_main, 0);
    setcontext(&first);
    abort();
}

inline void resume(unsigned i) {
    current = i, threadIdx.x = i;
    if (fibers[i].begun) _longjmp(fibers[i].here, 1);
    fibers[i].begun = true;
    begin();
}

inline unsigned draw(unsigned below) {
    random_state = random_state * 1664525u + 1013904223u;
    return (unsigned)((uint64_t)(random_state >> 8) * below >> 24);
}

inline void arrange(unsigned *at, unsigned count) {
    for (unsigned i = 0; i < count; i++) at[i] = order == DESCENDING ? count - 1 - i : i;
    for (unsigned i = count - 1; order >= RANDOM && i > 0; i--) {
        const unsigned j = draw(i + 1), kept = at[i];
        at[i] = at[j], at[j] = kept;
    }
}

// A block; false where it failed
inline bool run_block() {
    static unsigned warp, lane, warps[32], lanes[32];  // static: survive a longjmp
    static bool moved, any;
    static volatile int how;
    if (static_size) memset(static_begin, 0xff, static_size);
    memset(dynamic_begin - 4096, 0xff, dynamic_size + 8192);
    memset(unpublished, 0, sizeof unpublished);
    alive = threads, waiting = 0, barrier_all = 1, barrier_any = barrier_count = 0;
    memset(passed, 0, sizeof passed);
    for (unsigned i = 0; i < threads; i++)
        fibers[i].state = READY, fibers[i].copies.clear(), fibers[i].products.clear();
    while (alive) {
        any = false;
        arrange(warps, (threads + 31) / 32);
        for (warp = 0; warp < (threads + 31) / 32; warp++)
            do {
                moved = false;
                arrange(lanes, 32);
                for (lane = 0; lane < 32; lane++) {
                    const unsigned i = warps[warp] * 32 + lanes[lane];
                    if (i >= threads || fibers[i].state != READY) continue;
                    moved = any = true;
                    how = _setjmp(scheduler);
                    if (how == 0) resume(warps[warp] * 32 + lanes[lane]);
                    if (how == 2) return false;
                }
            } while (moved && order < RANDOM);
        if (any || !alive) continue;
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].state != DONE) {
                snprintf(message, sizeof message, "block %u: %u of %u threads wait for ever, thread %u at line %d",
                         blockIdx.x, alive, threads, i, fibers[i].line);
                return false;
            }
    }
    for (unsigned i = 32; i < threads; i += 32)
        if (i % 128 && fibers[i].products.total != fibers[i / 128 * 128].products.total) {
            snprintf(message, sizeof message, "block %u: warps %u and %u take part in %u and %u products of four warps",
                     blockIdx.x, i / 128 * 4, i / 32, fibers[i / 128 * 128].products.total, fibers[i].products.total);
            return false;
        }
    for (size_t i = 0; i < 4096; i++)
        if (dynamic_begin[-1 - (long)i] != -1 || dynamic_begin[dynamic_size + i] != -1) {
            snprintf(message, sizeof message, "block %u wrote outside its %zu bytes of dynamic shared memory",
                     blockIdx.x, dynamic_size);
            return false;
        }
    return true;
}

inline int find_static(dl_phdr_info *info, size_t, void *) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &part = info->dlpi_phdr[i];
        const char *begin = (const char *)info->dlpi_tls_data;
        if (part.p_type != PT_TLS || !begin || anchor < begin || anchor >= begin + part.p_memsz) continue;
        static_begin = (char *)begin, static_size = part.p_memsz;
        return 1;
    }
    return 0;
}

inline void fault(int, siginfo_t *info, void *) {
    const char *at = (char *)info->si_addr;
    const bool full = at >= stacks && at < stacks + STACK * threads;
    fail("touches %p, which is not its own%s", at, full ? ": its stack is full" : "");
}

inline const char *run(void (*what)(const void *), unsigned blocks, unsigned count, unsigned shared, int in_order,
                       const void *with) {
    static char dynamic[ALL_SHARED + 16384] __attribute__((aligned(1024)));
    *(volatile char *)anchor = 0;
    dl_iterate_phdr(find_static, 0);
    dynamic_begin = dynamic + 4096, dynamic_size = shared;
    if (static_size - sizeof anchor > STATIC_SHARED || static_size - sizeof anchor + shared > ALL_SHARED || !count ||
        count > MOST_THREADS || count % 32) {
        snprintf(message, sizeof message, "%u threads with %zu and %u bytes of shared memory are not to be had", count,
                 static_size - sizeof anchor, shared);
        return message;
    }
    void *p = mmap(0, STACK * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return "no memory for stacks";
    stacks = (char *)p;
    for (unsigned i = 0; i < count; i++) mprotect(stacks + i * STACK, 4096, PROT_NONE);  // where one would overflow
    kernel = what, argument = with, threads = count, order = in_order, random_state = in_order;
    blockDim = {count, 1, 1}, gridDim = {blocks, 1, 1}, threadIdx = blockIdx = {0, 0, 0};
    for (unsigned i = 0; i < count; i++) fibers[i].begun = false;
    static char for_faults[65536];
    stack_t apart = {}, usual_stack;
    apart.ss_sp = for_faults, apart.ss_size = sizeof for_faults;
    sigaltstack(&apart, &usual_stack);
    struct sigaction on_fault = {}, usual[2];
    on_fault.sa_sigaction = fault, on_fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &on_fault, &usual[0]), sigaction(SIGBUS, &on_fault, &usual[1]);
    bool right = true;
    for (unsigned i = 0; i < blocks && right; i++) {
        blockIdx.x = order == DESCENDING ? blocks - 1 - i : i;
        right = run_block();
    }
    sigaction(SIGSEGV, &usual[0], 0), sigaction(SIGBUS, &usual[1], 0);
    sigaltstack(&usual_stack, 0);
    munmap(stacks, STACK * count);
    return right ? 0 : message;
}

template <class T> struct Shuffle { T value; unsigned from; };

template <class T> inline T shuffle(unsigned mask, T value, unsigned from, int line) {
    Shuffle<T> mine{value, from};
    collective(mask, line, &mine, [line](void **data, unsigned mask) {
        T got[32];
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            const unsigned from = ((Shuffle<T> *)data[i])->from;
            if (!(mask >> from & 1)) fail("line %d: lane %d reads lane %u, not in %08x", line, i, from, mask);
            got[i] = ((Shuffle<T> *)data[from])->value;
        }
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) ((Shuffle<T> *)data[i])->value = got[i];
    });
    return mine.value;
}

inline unsigned ballot(unsigned mask, bool value, int line) {
    unsigned mine = value;
    collective(mask, line, &mine, [](void **data, unsigned mask) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) all |= *(unsigned *)data[i] << i;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) *(unsigned *)data[i] = all;
    });
    return mine;
}

template <class T> void call(void (*kernel)(T), const void *argument) { kernel(*(const T *)argument); }

}  // namespace emulator

#define AT int line = __builtin_LINE()

inline void __syncthreads(AT) { emulator::barrier(true, line); }
inline int __syncthreads_and(int value, AT) { return emulator::barrier(value, line), emulator::all_result; }
inline int __syncthreads_or(int value, AT) { return emulator::barrier(value, line), emulator::any_result; }
inline int __syncthreads_count(int value, AT) { return emulator::barrier(value, line), emulator::count_result; }
inline void __syncwarp(unsigned mask = ~0u, AT) { emulator::collective(mask, line, 0, [](void **, unsigned) {}); }
inline unsigned __ballot_sync(unsigned mask, int value, AT) { return emulator::ballot(mask, value, line); }
inline int __any_sync(unsigned mask, int value, AT) { return emulator::ballot(mask, value, line) != 0; }
inline int __all_sync(unsigned mask, int value, AT) { return emulator::ballot(mask, value, line) == mask; }

template <class T> inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, AT) {
    const unsigned lane = threadIdx.x % 32;
    return emulator::shuffle(mask, value, (lane & -width) | (from & (width - 1)), line);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, AT) {
    const unsigned lane = threadIdx.x % 32, from = (lane ^ other) & 31;
    return emulator::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, line);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, AT) {
    const unsigned lane = threadIdx.x % 32;
    return emulator::shuffle(mask, value, (lane & (width - 1)) < by ? lane : lane - by, line);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, AT) {
    const unsigned lane = threadIdx.x % 32;
    return emulator::shuffle(mask, value, (lane & (width - 1)) + by >= (unsigned)width ? lane : lane + by, line);
}

template <class T> inline T __ldg(const T *p) { return *p; }
template <class T> inline T __ldcg(const T *p) { return *p; }
template <class T> inline T __ldcs(const T *p) { return *p; }
template <class T> inline void __stwb(T *p, T v) { *p = v; }
template <class T> inline void __stcg(T *p, T v) { *p = v; }
template <class T> inline void __stcs(T *p, T v) { *p = v; }
