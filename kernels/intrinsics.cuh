// What the kernels need of the instruction set beyond CUDA C++: all inline assembly of the project.
//
// The first source of every kernel (cuda_layout.py, nvrtc.py). tests/kernels/emulator has its own version of each function for
// a CPU, so a kernel that keeps to these and to CUDA's built-ins runs there too. TYPE: 1 bfloat16, 2 half. Fragments of
// matrices are those of the PTX ISA; below, g = lane / 4 and q = lane % 4. Matrices and asynchronous copies need sm_80.

#define INLINE __device__ __forceinline__

typedef long long i64;

// A pointer kept whole: the compiler would rather add its parts again at every access
template <class Target> INLINE Target *whole(Target *p) {
    asm("" : "+l"(p));
    return p;
}

// A number that the compiler forms what depends on it from again, rather than keep that in registers
INLINE unsigned opaque(unsigned v) {
    asm volatile("" : "+r"(v));
    return v;
}

// row * bytes in one instruction, also where the compiler has widened bytes before a loop
INLINE i64 offset(int row, int bytes) {
    i64 product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(row), "r"(bytes));
    return product;
}

// p + row * bytes in one instruction
INLINE const char *beyond(const char *p, int row, int bytes) {
    const char *sum;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(row), "r"(bytes), "l"(p));
    return sum;
}

INLINE float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

INLINE float reciprocal_fast(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

INLINE float half_to_float(unsigned short bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

INLINE unsigned short float_to_half(float f) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

INLINE unsigned short float_to_bfloat16(float f) {
#if __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
#else
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
#endif
}

// All warps of a block meet, from whichever line each comes
INLINE void meet_warps() { asm volatile("barrier.sync 0;" : : : "memory"); }

// A block's dynamic shared memory, of as many bytes as nvrtc.kernel was asked for; aligned to 1024
INLINE char *dynamic_shared() {
    extern __shared__ __align__(1024) char dynamic[];
    return dynamic;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// c += a b of one warp's matrices, 16 x 8 and 8 x 8, their elements cut to 10 bits of mantissa. a: (g, q), (g + 8, q),
// (g, q + 4), (g + 8, q + 4); b: (q, g), (q + 4, g); c: as below
INLINE void mma_16x8x8(float *c, const float *a, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// c += a b of one warp's matrices, 16 x 16 and 16 x 8. Pairs of elements a register, the lower index in the lower half;
// a: (g, 2 q), (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8); b: (2 q, g), (2 q + 8, g); c: (g, 2 q), (g, 2 q + 1),
// (g + 8, 2 q), (g + 8, 2 q + 1)
template <int TYPE> INLINE void mma_16x8x16(float c[4], const unsigned a[4], const unsigned b[2]) {
    if constexpr (TYPE == 1)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An address in shared memory as instructions take it
INLINE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// Four matrices of 8 x 8 elements of 16 bits from shared memory: lane i names the row i % 8 of matrix i / 8, 16 bytes at
// a multiple of 16. r[m] gets (g, 2 q), (g, 2 q + 1) of matrix m; transposed (2 q, g), (2 q + 1, g)
INLINE void ldmatrix_x4(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

INLINE void ldmatrix_x4_trans(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// 16 bytes from global to shared memory, both at multiples of 16, zeros if not `inside` (global is not read then, but
// has to be an address); there once this thread has waited for its group
INLINE void copy_async_16(void *shared, const void *global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(inside ? 16 : 0)
                 : "memory");
}

// The same, of a line of 128 bytes whose rest others will soon copy
INLINE void copy_async_16_of_line(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global))
                 : "memory");
}

// One warp to another, through barrier `id` from 1 to 15: what it wrote before pass_on is there after take_over. Neither
// for a second time before the other has come
INLINE void pass_on(int id) { asm volatile("bar.arrive %0, 64;" : : "r"(id) : "memory"); }
INLINE void take_over(int id) { asm volatile("bar.sync %0, 64;" : : "r"(id) : "memory"); }

// Ends a group: the copies since the last one
INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until all groups but the so many youngest have arrived
template <int YOUNGEST> INLINE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(YOUNGEST) : "memory");
}

template <int TYPE> INLINE unsigned pack2(float low, float high) {
    unsigned pair;
    if constexpr (TYPE == 1)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// x: the lower half, y: the upper
template <int TYPE> INLINE float2 unpack2(unsigned pair) {
    if constexpr (TYPE == 1) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    return make_float2(half_to_float((unsigned short)pair), half_to_float((unsigned short)(pair >> 16)));
}

// Products of two pairs, each rounded
template <int TYPE> INLINE unsigned multiply2(unsigned a, unsigned b) {
    unsigned pair;
    if constexpr (TYPE == 1)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(0x80008000));
    else
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define FOUR(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])

// c += a b of four warps that begin at a multiple of four: each gives 16 rows of a and gets 16 x 64 of c, as fragments of
// mma_16x8x16; b: 16 rows of 128 bytes in shared memory, the first at a multiple of 1024, whose 16-byte pieces p are at
// p ^ (row % 8). c is overwritten if not ADD. Runs on while the warps do: between begin and wait a and c are not touched
template <int TYPE, bool ADD> INLINE void tensor_64x64x16(float (*c)[4], const unsigned a[4], const char *rows) {
    static_assert(TYPE == 1);
    const unsigned address = shared_address(rows);
    const unsigned long long b = (address >> 4 & 0x3fff) | 64ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, %37, 1, 1, 1;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

// The same with b the transpose of a part of such a tile: its columns from `columns` on, a multiple of 32 bytes in a row
// that is a multiple of 8, are b's rows
template <int TYPE, bool ADD>
INLINE void tensor_64x64x16_transposed(float (*c)[4], const unsigned a[4], const char *columns) {
    static_assert(TYPE == 1);
    const unsigned address = shared_address(columns);
    const unsigned long long b = (address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

template <int TYPE, bool ADD>
INLINE void tensor_64x32x16_transposed(float (*c)[4], const unsigned a[4], const char *columns) {
    static_assert(TYPE == 1);
    const unsigned address = shared_address(columns);
    const unsigned long long b = (address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, %21, 1, 1, 0;"
                 : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD ? 1 : 0));
}

INLINE void tensor_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
INLINE void tensor_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Until all groups but the so many youngest are done
template <int YOUNGEST> INLINE void tensor_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(YOUNGEST) : "memory");
}

// After the wait, before c is looked at
INLINE void tensor_hold(float (*c)[4]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(c[i / 4][i % 4]) : : "memory");
}

INLINE void tensor_hold(float &v) { asm volatile("" : "+f"(v) : : "memory"); }

// What this thread has copied into shared memory may be read by tensor_64x64x16, once the others have passed a barrier
INLINE void tensor_publish() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

#endif

#endif
