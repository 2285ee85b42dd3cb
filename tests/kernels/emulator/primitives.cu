// Every function of intrinsics.cuh, for a test on the emulator and on a GPU. ENTRY chooses; one block of one warp.

struct Argument {
    const char *a, *b;
    char *c;
    int rows;
};

// c (16, 8) = a (16, 16) b (16, 8) of TYPE, rows of a from `rows` on taken as 0. TRANSPOSED: a and b are stored so
template <int TYPE, bool TRANSPOSED> INLINE void product(const Argument &argument) {
    constexpr int PITCH = 48;  // bytes of a row: at most 16 elements, padded
    char *a = dynamic_shared(), *b = a + 16 * PITCH;
    const int lane = threadIdx.x;
    copy_async_16(a + lane / 2 * PITCH + lane % 2 * 16, argument.a + lane * 16, lane / 2 < argument.rows);
    copy_async_commit();
    const int b_row = TRANSPOSED ? 2 : 1;  // pieces of 16 bytes
    if (lane < 16) copy_async_16(b + lane / b_row * PITCH + lane % b_row * 16, argument.b + lane * 16, true);
    copy_async_commit();
    unsigned fragment_a[4], fragment_b[4];  // of b twice the same half
    copy_async_wait<1>();
    __syncwarp();
    if (TRANSPOSED) ldmatrix_x4_trans(fragment_a, a + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16);
    else ldmatrix_x4(fragment_a, a + lane % 16 * PITCH + lane / 16 * 16);
    copy_async_wait<0>();
    __syncwarp();
    if (TRANSPOSED) ldmatrix_x4(fragment_b, b + lane % 8 * PITCH + lane / 8 % 2 * 16);
    else ldmatrix_x4_trans(fragment_b, b + lane % 16 * PITCH);
    float c[4] = {};
    mma_16x8x16<TYPE>(c, fragment_a, fragment_b);
    for (int i = 0; i < 4; i++)
        ((float *)argument.c)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// c (16, 8) = a (16, 8) b (8, 8) in float
INLINE void product_tf32(const Argument &argument) {
    const float *a = (const float *)argument.a, *b = (const float *)argument.b;
    const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    const float own[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
    float c[4] = {};
    mma_16x8x8(c, own, b[q * 8 + g], b[(q + 4) * 8 + g]);
    for (int i = 0; i < 4; i++) ((float *)argument.c)[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = c[i];
}

// a: `rows` floats, rows even. b: as many to c of TYPE, packed; then c back to floats
template <int TYPE> INLINE void rounded(const Argument &argument) {
    const float2 *in = (const float2 *)argument.a;
    float2 *back = (float2 *)argument.c;
    unsigned *singles = (unsigned *)argument.c + argument.rows;
    for (int i = threadIdx.x; i < argument.rows / 2; i += 32) {
        const float2 v = in[i];
        back[i] = unpack2<TYPE>(pack2<TYPE>(v.x, v.y));
        singles[i] = TYPE == 1 ? float_to_bfloat16(v.x) | (unsigned)float_to_bfloat16(v.y) << 16
                               : float_to_half(v.x) | (unsigned)float_to_half(v.y) << 16;
    }
}

#if TENSOR_ASYNC
// c (64, COLUMNS) = a (64, 16) b (16, COLUMNS) by four warps; b is the first rows of a tile, or TRANSPOSED its first
// columns. PUBLISHED, WAITED and TOGETHER: what has to be done for it to be right
template <int COLUMNS, bool TRANSPOSED, bool PUBLISHED, bool WAITED, bool TOGETHER>
INLINE void four_warps(const Argument &argument) {
    char *const tile = dynamic_shared();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    constexpr int PIECES = TRANSPOSED ? 2 : COLUMNS / 8;  // of a row
    for (int i = threadIdx.x; i < COLUMNS * 2; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        copy_async_16(tile + row * 128 + ((piece ^ row % 8) << 4), argument.b + i * 16, true);
    }
    copy_async_commit();
    copy_async_wait<0>();
    if (PUBLISHED) tensor_publish();
    __syncthreads();
    const unsigned *rows = (const unsigned *)argument.a + (warp * 16 + g) * 8;
    const unsigned a[4] = {rows[q], rows[64 + q], rows[q + 4], rows[64 + q + 4]};
    float c[8][4];
    for (int i = 0; i < 8; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = -1.f;
    if (TOGETHER || warp) {
        tensor_begin();
        if (!TRANSPOSED) tensor_64x64x16<1, false>(c, a, tile);
        else if (COLUMNS == 64) tensor_64x64x16_transposed<1, false>(c, a, tile);
        else tensor_64x32x16_transposed<1, false>(c, a, tile);
        tensor_commit();
        if (WAITED) tensor_wait<0>();
        tensor_hold(c);
    }
    for (int i = 0; i < COLUMNS / 8; i++)
        for (int k = 0; k < 4; k++)
            ((float *)argument.c)[(warp * 16 + g + k / 2 * 8) * COLUMNS + i * 8 + q * 2 + k % 2] = c[i][k];
}
#endif

// c: a, which the second of two warps has written to shared memory for the first
INLINE void passed_on(const Argument &argument) {
    __shared__ float v[32];
    const int lane = threadIdx.x % 32;
    if (threadIdx.x >= 32) {
        v[lane] = ((const float *)argument.a)[lane];
        pass_on(3);
    } else {
        take_over(3);
        ((float *)argument.c)[lane] = v[31 - lane];
    }
}

// c: 2^a and 1 / a
INLINE void approximations(const Argument &argument) {
    const float *in = whole((const float *)argument.a);
    for (int i = threadIdx.x; i < argument.rows; i += 32) {
        *(float *)(argument.c + offset(i, 8)) = exp2_fast(in[i]);
        *(float *)(argument.c + offset(i, 8) + 4) = reciprocal_fast(in[i]);
    }
}

// What does not work: each hangs, or gives bits that depend on the order of threads
INLINE void diverging_barriers(const Argument &) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}

INLINE void lonely_shuffle(const Argument &) {
    if (threadIdx.x % 32) __shfl_xor_sync(~0u, 1.f, 1);
}

INLINE void lonely_barrier(const Argument &) {
    if (threadIdx.x == 0) __syncwarp();
    else __syncthreads();
}

INLINE void taken_over_from_no_one(const Argument &) {
    if (threadIdx.x < 32) take_over(1);
}

INLINE void passed_on_twice(const Argument &) {
    for (int i = 0; i < 2 && threadIdx.x < 32; i++) pass_on(1);
}

INLINE void race(const Argument &argument) {
    __shared__ float v[64];
    v[threadIdx.x] = threadIdx.x;
    __syncwarp();  // the other warp's are read too
    ((float *)argument.c)[threadIdx.x] = v[63 - threadIdx.x];
}

INLINE void no_wait(const Argument &argument) {
    copy_async_16(dynamic_shared() + threadIdx.x * 16, argument.a + threadIdx.x * 16, true);
    copy_async_commit();
    ((float *)argument.c)[threadIdx.x] = ((float *)dynamic_shared())[threadIdx.x * 4];
}

INLINE void beyond_shared(const Argument &) { dynamic_shared()[4080 + threadIdx.x] = 0; }

INLINE void beyond_tensor(const Argument &argument) {
    if (threadIdx.x == 40) ((float *)argument.c)[argument.rows] = 0.f;
}

INLINE void crooked_row(const Argument &) {
    unsigned r[4];
    ldmatrix_x4(r, dynamic_shared() + threadIdx.x * 8);
}

extern "C" __global__ void primitive(const Argument argument) { ENTRY(argument); }
