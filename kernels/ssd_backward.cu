// The gradients of state-space duality on NVIDIA GPUs, both directions in one pass (ssd_cuda_backward.py).
//
// Compiled behind intrinsics.cuh, one ENTRY at a time. `decays` turns dt into decays to the borders of tiles of TILE
// tokens; `walk` takes each head's states and costates through the sequence and leaves those that enter each tile;
// `gradients` does the rest, one block a tile and several heads of a group; `sums` adds up what blocks left.
//
// A warp of `gradients` owns 16 tokens, as senders j of x and B and as receivers i of dy and C. With m_ij the decay
// from j to i, S = C B^T, G_ij = dy_i . x_j: dx_j = dt_j (sum_i m S dy_i + what leaves the tile) + D_j dy_j, and of all
// heads together dS = sum dt_j m G, dB += dS^T C, dC += dS B. T_ij = dt_j m S G of a pair is the gradient of every
// log-decay on the path from j to i: paths are sorted by where in the tile they begin and end, and those that cross it
// are what enters times what leaves on the other side.
//
// Macros: KERNEL, ENTRY, ARGUMENT (its name, what it runs, on what); THREADS, RESIDENT (blocks a processor); TILE; in
// flight: STAGES of a walk, BUFFERS of gradients, 1 or 2; P, N: widths, multiples of 16; DT_TYPE of dt (0 float, 1
// bfloat16, 2 half; x, dy, B and C are bfloat16); BOTH directions; DIAGONAL: directions that count a token's own pair;
// SOFTPLUS; HAS_D; PARTIAL: dB and dC are parts of a sum, in float; TENSOR_ASYNC: products by four warps together.

#define LOG2E 1.4426950408889634f
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b))

typedef unsigned short bits16;

constexpr int OPERAND = 1, KEPT = 2;  // bfloat16; float16, of products of B and C
constexpr int WARPS = THREADS / 32, KINDS = BOTH ? 4 : 2, STATE = N * P;

struct View { i64 batch, head, token; };  // strides in bytes; a tile of tokens stays below 2^31

struct Call {
    const char *x, *dy, *B, *C, *dt;
    const float *A, *bias, *D;        // (H,), (H,) or null, strided as D_view says
    const float *initial, *gradient;  // (batch, directions, H, p, n) or null: initial state, gradient of the last state
    float *planes;                    // (8, batch, H, tiles TILE)
    bits16 *states;                   // (batch, tiles, H, KINDS, N, P): what enters each tile
    char *dx, *ddt;                   // (batch, L, H, p), (batch, L, H), tokens dx_row and ddt_row apart
    char *dB, *dC;                    // (parts, batch, L, groups, n), tokens dBC_row apart
    float *dD, *dinitial;             // (batch, L, H), (batch, directions, H, p, n) or null
    float *dA, *dbias;                // (batch, tiles, H)
    View x_view, dy_view, B_view, C_view, dt_view, D_view;
    i64 dx_row, ddt_row, dBC_row;                      // elements from a token's gradients to the next one's
    i64 batch, length, tiles, H, groups, parts, part;  // part: heads of a block
    int p, n, walked;                                  // p, n: widths in memory, multiples of 8
};

struct Sum {
    const float *dB_parts, *dC_parts, *dA_rows, *dbias_rows;  // (parts, inner), (rows, H)
    unsigned *dB, *dC;  // pairs, `pairs` of a token and `row` from one to the next
    float *dA, *dbias;
    i64 parts, inner, rows, H, pairs, row;
};

// Planes of `decays`: log2-decay from the tile's left border through a token, through it to the right border, dt, D;
// then what each kind of state multiplies its tokens by
enum { FROM_LEFT, TO_RIGHT, STEP, SKIP, SCALE, PLANES = SCALE + 4 };

// Kinds: what x sends to the right, what dy sends back to the left; of the other direction, the same mirrored
enum { STATE_RIGHT, COSTATE_LEFT, STATE_LEFT, COSTATE_RIGHT };

template <int KIND_TYPE> INLINE float decode(const char *p, i64 i) {
    if constexpr (KIND_TYPE == 0) return ((const float *)p)[i];
    const bits16 v = ((const bits16 *)p)[i];
    return KIND_TYPE == 1 ? __uint_as_float((unsigned)v << 16) : half_to_float(v);
}

template <int KIND_TYPE> INLINE void encode(char *p, i64 i, float v) {
    if constexpr (KIND_TYPE == 0) ((float *)p)[i] = v;
    else ((bits16 *)p)[i] = KIND_TYPE == 1 ? float_to_bfloat16(v) : float_to_half(v);
}

INLINE float softplus(float v) {
    const float e = exp2_fast(-fabsf(v) * LOG2E), s = e * reciprocal_fast(e + 2.f), q = s * s;
    const float p = 2.001245514e-1f + q * (1.398030134e-1f + q * 1.408916763e-1f);
    return fmaxf(v, 0.f) + 2.f * s * (1.f + q * (3.333315734e-1f + q * p));
}

// d softplus(v) / dv = 1 - exp(-softplus(v))
INLINE float softplus_slope(float dt) {
    const float series = dt * (1.f - dt * (1.f / 2 - dt * (1.f / 6 - dt * (1.f / 24 - dt * (1.f / 120)))));
    return dt < 0.125f ? series : 1.f - exp2_fast(-dt * LOG2E);
}

// A tile of rows of 16-bit elements in shared memory, 16 bytes a chunk, so that 8 rows' chunks miss bank conflicts
template <int WIDTH> struct Rows {
    static constexpr int PITCH = WIDTH % 64 ? WIDTH + 8 : WIDTH;

    static INLINE unsigned at(unsigned row, unsigned chunk) {
        return row * PITCH + (WIDTH % 64 ? chunk : chunk ^ row % 8) * 8;
    }
    // of the 16 x 16 elements at (row, column), the chunk that a lane names: by columns of 8, or by rows of 8
    static INLINE const char *place(const bits16 *tile, unsigned own, unsigned row, unsigned column) {
        return (const char *)tile + row * PITCH * 2 + (WIDTH % 64 ? own * 2 + column * 2 : own * 2 ^ column * 2);
    }
    static INLINE const char *by_columns(const bits16 *tile, unsigned row, unsigned column) {
        return place(tile, at(threadIdx.x % 16, threadIdx.x % 32 / 16), row, column);
    }
    static INLINE const char *by_rows(const bits16 *tile, unsigned row, unsigned column) {
        return place(tile, at(threadIdx.x % 32 / 16 * 8 + threadIdx.x % 8, threadIdx.x / 8 % 2), row, column);
    }
    // Copies from memory: a thread takes chunk `chunk()` of every PASS-th row from row() on. `own`: its address;
    // zeros from row `rows` and element `width` on
    static constexpr int CHUNKS = WIDTH / 8, PASS = THREADS / CHUNKS;
    static INLINE int row() { return threadIdx.x / CHUNKS; }
    static INLINE int chunk() { return threadIdx.x % CHUNKS; }
    static INLINE i64 own(i64 pitch) { return row() * pitch + chunk() * 16; }
    template <int ROWS> static INLINE bool takes(int pass) {
        return (THREADS % CHUNKS == 0 || row() < PASS) && (ROWS % PASS == 0 || row() + pass * PASS < ROWS);
    }
    template <int ROWS> static INLINE void fetch(bits16 *to, const char *own, i64 pitch, int rows, int width) {
        static_assert(WIDTH % 64 || PASS % 8 == 0, "a thread's rows are stored alike");
        to += at(row(), chunk());
#pragma unroll
        for (int j = 0; j < ROUND_UP(ROWS, PASS); j++)
            if (takes<ROWS>(j))
                copy_async_16(to + j * PASS * PITCH, own + j * PASS * pitch,
                              row() + j * PASS < rows && chunk() * 8 < width);
    }
    // 16 x 16 at (row, column): as left factor, its transpose as left factor, as right factor, its transpose as that
    static INLINE void left(unsigned *r, const bits16 *tile, unsigned row, unsigned column) {
        ldmatrix_x4(r, by_columns(tile, row, column));
    }
    static INLINE void left(unsigned (*r)[4], const bits16 *tile, unsigned row) {  // all columns
#pragma unroll
        for (int column = 0; column < WIDTH; column += 16) left(r[column / 16], tile, row, column);
    }
    static INLINE void left_transposed(unsigned *r, const bits16 *tile, unsigned row, unsigned column) {
        ldmatrix_x4_trans(r, by_rows(tile, row, column));
    }
    static INLINE void right(unsigned *r, const bits16 *tile, unsigned row, unsigned column) {
        ldmatrix_x4_trans(r, by_columns(tile, row, column));
    }
    static INLINE void right_transposed(unsigned *r, const bits16 *tile, unsigned row, unsigned column) {
        ldmatrix_x4(r, by_rows(tile, row, column));
    }
};

// c (16 x 16, two fragments) += a b
INLINE void multiply(float (*c)[4], const unsigned *a, const unsigned *b) {
    mma_16x8x16<OPERAND>(c[0], a, b);
    mma_16x8x16<OPERAND>(c[1], a, b + 2);
}

// This thread's warp, which the compiler then knows to be the same for the warp
INLINE int warp_of_block() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// c (16 x COLUMNS of a warp) = or, ADD, += the sum over STEPS of a[k] (16 x 16) times 16 rows of a tile from `row` on;
// or times the transpose of 16 of its columns. TENSOR_ASYNC: four warps together, each with its own a and c, which are
// in use until `finish_products`
template <int WIDTH, int COLUMNS, int STEPS, bool ADD>
INLINE void add_rows(float (*c)[2][4], const unsigned (*a)[4], const bits16 *tile, unsigned row) {
#if TENSOR_ASYNC
    tensor_begin();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const char *const from = (const char *)tile + (row + k * 16) * 128;
        if (ADD || k) tensor_64x64x16<OPERAND, true>(c[0], a[k], from);
        else tensor_64x64x16<OPERAND, false>(c[0], a[k], from);
    }
    tensor_commit();
#else
#pragma unroll
    for (int e = 0; !ADD && e < COLUMNS / 2; e++) c[e / 8][e / 4 % 2][e % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 16) {
            unsigned b[4];
            Rows<WIDTH>::right(b, tile, row + k * 16, column);
            multiply(c[column / 16], a[k], b);
        }
#endif
}
template <int WIDTH, int COLUMNS, int STEPS>
INLINE void set_columns(float (*c)[2][4], const unsigned (*a)[4], const bits16 *tile, unsigned row) {
#if TENSOR_ASYNC
    tensor_begin();
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        const char *const from = (const char *)tile + row * 128 + k * 32;
        if constexpr (COLUMNS == 32) {
            if (k) tensor_64x32x16_transposed<OPERAND, true>(c[0], a[k], from);
            else tensor_64x32x16_transposed<OPERAND, false>(c[0], a[k], from);
        } else {
            if (k) tensor_64x64x16_transposed<OPERAND, true>(c[0], a[k], from);
            else tensor_64x64x16_transposed<OPERAND, false>(c[0], a[k], from);
        }
    }
    tensor_commit();
#else
#pragma unroll
    for (int e = 0; e < COLUMNS / 2; e++) c[e / 8][e / 4 % 2][e % 4] = 0.f;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            unsigned b[4];
            Rows<WIDTH>::right_transposed(b, tile, row + n, k * 16);
            multiply(c[n / 16], a[k], b);
        }
#endif
}
template <int BLOCKS> INLINE void finish_products(float (*c)[2][4]) {
#if TENSOR_ASYNC
    tensor_wait<0>();
#pragma unroll
    for (int e = 0; e < 8 * BLOCKS; e++) tensor_hold(c[e / 8][e / 4 % 2][e % 4]);
#endif
}
// What this thread has copied is there
INLINE void publish_copies() {
#if TENSOR_ASYNC
    tensor_publish();
#endif
}

// Of a warp's 16 x 16 product each lane gets 8 neighbours: of row row_of_lane(), from column 8 * (lane % 4 / 2) on
INLINE int row_of_lane() { return threadIdx.x % 2 * 8 + threadIdx.x % 32 / 4; }
INLINE uint4 neighbours(const float (*c)[4]) {
    const bool odd = threadIdx.x % 2, upper = threadIdx.x / 2 % 2;
    unsigned mine[2], other[2];
#pragma unroll
    for (int block = 0; block < 2; block++) {
        const unsigned top = pack2<OPERAND>(c[block][0], c[block][1]), low = pack2<OPERAND>(c[block][2], c[block][3]);
        const unsigned far = __shfl_xor_sync(~0u, odd ? top : low, 1);
        mine[block] = odd ? far : top, other[block] = odd ? low : far;  // the even lane's, the odd one's
    }
    const unsigned x = __shfl_xor_sync(~0u, upper ? mine[0] : mine[1], 2);
    const unsigned y = __shfl_xor_sync(~0u, upper ? other[0] : other[1], 2);
    return upper ? make_uint4(x, y, mine[1], other[1]) : make_uint4(mine[0], other[0], x, y);
}

// The sum over four lanes of v[lane % 2]
INLINE float sum_of_row(const float *v) {
    const bool odd = threadIdx.x % 2;
    const float sum = (odd ? v[1] : v[0]) + __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
}

// Of the sums of four values over lanes that differ in bits 3 and 2, each lane gets the one that these bits number
INLINE float sum_of_column(const float *v, bool bit_3, bool bit_2) {
    const float one = (bit_3 ? v[2] : v[0]) + __shfl_xor_sync(~0u, bit_3 ? v[0] : v[2], 8);
    const float two = (bit_3 ? v[3] : v[1]) + __shfl_xor_sync(~0u, bit_3 ? v[1] : v[3], 8);
    return (bit_2 ? two : one) + __shfl_xor_sync(~0u, bit_2 ? one : two, 4);
}

// Of two neighbours of a row of an 8 x 8 product, the one on the diagonal, or 0; and a pair of which one is v, if there
INLINE float on_diagonal(float one, float two) {
    const int beyond = threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
    return beyond == 0 ? one : beyond == 1 ? two : 0.f;
}
INLINE unsigned on_diagonal(float v) {
    const int beyond = threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
    return pack2<OPERAND>(beyond == 0 ? v : 0.f, beyond == 1 ? v : 0.f);
}

INLINE float sum_of_warp(float v) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

// Sums over a warp of COUNT neighbours a lane, from the first lane on (or the last): v[j] gets those up to its own
template <int COUNT> INLINE void scan_of_warp(float *v, bool from_last) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 1; j < COUNT; j++) {
        if (from_last) v[COUNT - 1 - j] += v[COUNT - j];
        else v[j] += v[j - 1];
    }
    const float own = from_last ? v[0] : v[COUNT - 1];
    float sum = own;
#pragma unroll
    for (int reach = 1; reach < 32; reach *= 2) {
        const float other = from_last ? __shfl_down_sync(~0u, sum, reach) : __shfl_up_sync(~0u, sum, reach);
        sum += (from_last ? lane + reach < 32 : lane >= reach) ? other : 0.f;
    }
    float outside = from_last ? __shfl_down_sync(~0u, sum, 1) : __shfl_up_sync(~0u, sum, 1);
    if (lane == (from_last ? 31 : 0)) outside = 0.f;
#pragma unroll
    for (int j = 0; j < COUNT; j++) v[j] += outside;
}

INLINE float power_of_2(float n) { return __uint_as_float((unsigned)((int)n + 127) << 23); }  // n from -126 to 127

constexpr int EACH = TILE / 32;  // tokens a lane where a warp holds a tile's

// Neighbours in memory; the compiler does not find by itself that they can be moved at once
struct Each {
    float v[EACH];

    static INLINE Each load(const float *from) {
        Each to;
        if constexpr (EACH == 4) {
            const float4 four = *(const float4 *)from;
            to.v[0] = four.x, to.v[1] = four.y, to.v[2] = four.z, to.v[3] = four.w;
        } else {
            const float2 two = *(const float2 *)from;
            to.v[0] = two.x, to.v[1] = two.y;
        }
        return to;
    }
    INLINE void store(float *to) const {
        if constexpr (EACH == 4) __stwb((float4 *)to, make_float4(v[0], v[1], v[2], v[3]));
        else __stwb((float2 *)to, make_float2(v[0], v[1]));
    }
};

INLINE void decays(const Call &c) {
    constexpr int HEADS = 16, TOKENS = THREADS / HEADS;  // that a block takes at once
    __shared__ __align__(16) float steps[HEADS][TILE + 4], skips[HAS_D ? HEADS : 1][TILE + 4];
    const i64 blocks = ROUND_UP(c.H, HEADS), h0 = blockIdx.x % blocks * HEADS, padded = c.tiles * TILE;
    const i64 tile = blockIdx.x / blocks % c.tiles, b = blockIdx.x / blocks / c.tiles;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = threadIdx.x % HEADS, t = threadIdx.x / HEADS;
    const i64 h = min(h0 + head, c.H - 1);
    const float bias = c.bias ? c.bias[h] : 0.f;
    const char *from = c.dt + b * c.dt_view.batch + (tile * TILE + t) * c.dt_view.token + h * c.dt_view.head;
    const int rows = (int)min(c.length - tile * TILE, (i64)TILE);
    const char *skip = (const char *)c.D + b * c.D_view.batch + (tile * TILE + t) * c.D_view.token + h * c.D_view.head;
    float raw[TILE / TOKENS];
#pragma unroll
    for (int j = 0; j < TILE / TOKENS * HAS_D; j++)
        skips[head][t + j * TOKENS] = t + j * TOKENS < rows ? decode<0>(skip + j * TOKENS * c.D_view.token, 0) : 0.f;
#pragma unroll
    for (int j = 0; j < TILE / TOKENS; j++)
        raw[j] = t + j * TOKENS < rows ? decode<DT_TYPE>(from + j * TOKENS * c.dt_view.token, 0) + bias : 0.f;
#pragma unroll
    for (int j = 0; j < TILE / TOKENS; j++) {
        const float v = SOFTPLUS ? softplus(raw[j]) : raw[j];
        steps[head][t + j * TOKENS] = t + j * TOKENS < rows ? v : 0.f;
    }
    __syncthreads();
    const i64 plane = c.batch * c.H * padded;
    for (int k = warp; k < HEADS && h0 + k < c.H; k += WARPS) {
        const float rate = c.A[h0 + k] * LOG2E;
        const Each dt = Each::load(steps[k] + lane * EACH), skip = Each::load(skips[HAS_D ? k : 0] + lane * EACH);
        Each left, right, out[PLANES];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            left.v[j] = right.v[j] = dt.v[j] * rate;
        }
        scan_of_warp<EACH>(left.v, false);
        scan_of_warp<EACH>(right.v, true);
        const float before = __shfl_up_sync(~0u, left.v[EACH - 1], 1), after = __shfl_down_sync(~0u, right.v[0], 1);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const float to_left = j ? left.v[j ? j - 1 : 0] : lane ? before : 0.f;
            const float to_right = j < EACH - 1 ? right.v[j < EACH - 1 ? j + 1 : j] : lane < 31 ? after : 0.f;
            out[FROM_LEFT].v[j] = left.v[j];
            out[TO_RIGHT].v[j] = right.v[j];
            out[STEP].v[j] = dt.v[j];
            out[SKIP].v[j] = skip.v[j];
            out[SCALE + STATE_RIGHT].v[j] = dt.v[j] * exp2_fast(to_right);
            out[SCALE + COSTATE_LEFT].v[j] = exp2_fast(left.v[j]);
            out[SCALE + STATE_LEFT].v[j] = dt.v[j] * exp2_fast(to_left);
            out[SCALE + COSTATE_RIGHT].v[j] = exp2_fast(right.v[j]);
        }
        float *to = c.planes + (b * c.H + h0 + k) * padded + tile * TILE + lane * EACH;
#pragma unroll
        for (int j = 0; j < PLANES; j++)
            if (HAS_D || j != SKIP) out[j].store(to + j * plane);
    }
}

struct alignas(1024) WalkStage {
    bits16 keys[TILE * Rows<N>::PITCH], values[TILE * Rows<P>::PITCH];
    alignas(16) float scale[TILE], last[4];
};

// A warp's 16 rows of a state (N, P) in float, from or to a matrix (p, n) in memory
template <bool LOAD> INLINE void move_state(float (*state)[2][4], float *matrix, const Call &c) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < P / 2; e++) {
        const int n = row + e / 2 % 2 * 8, p = column + e / 4 * 8 + e % 2;
        float &v = state[e / 8][e / 4 % 2][e % 4];
        if (n >= c.n || p >= c.p) continue;
        if (LOAD) v = matrix[p * c.n + n];
        else matrix[p * c.n + n] = v;
    }
}

// One block a sequence, head and kind
INLINE void walk(const Call &c) {
    WalkStage *stages = (WalkStage *)dynamic_shared();
    const int kind = blockIdx.x % KINDS, direction = kind / 2, adjoint = kind % 2;
    const bool leftward = direction != adjoint;
    const i64 h = blockIdx.x / KINDS % c.H, b = blockIdx.x / KINDS / c.H, padded = c.tiles * TILE;
    const View &values_view = adjoint ? c.dy_view : c.x_view, &keys_view = adjoint ? c.C_view : c.B_view;
    const i64 matrix = ((b * (KINDS / 2) + direction) * c.H + h) * c.p * c.n;
    const float *outside = adjoint ? c.gradient : c.initial;
    float *const last = adjoint ? c.dinitial : 0;
    const int tiles = (int)c.tiles, steps = last ? tiles : tiles - 1, ahead = leftward ? -1 : 1;
    const i64 start = leftward ? tiles - 1 : 0;

    const char *values = (adjoint ? c.dy : c.x) + b * values_view.batch + h * values_view.head;
    const char *keys = (adjoint ? c.C : c.B) + b * keys_view.batch + h / (c.H / c.groups) * keys_view.head;
    values += start * TILE * values_view.token + Rows<P>::own(values_view.token);
    keys += start * TILE * keys_view.token + Rows<N>::own(keys_view.token);
    const i64 values_ahead = ahead * TILE * values_view.token, keys_ahead = ahead * TILE * keys_view.token;
    const float *planes = c.planes + (b * c.H + h) * padded + start * TILE, *totals = planes + TILE - 4;
    planes += (SCALE + kind) * c.batch * c.H * padded + threadIdx.x * 4;
    totals += (SCALE + COSTATE_LEFT) * c.batch * c.H * padded;
    int rows = (int)min(c.length - start * TILE, (i64)TILE);
    auto fetch = [&](int s) {
        if (s < steps) {
            WalkStage &to = stages[s % STAGES];
            Rows<N>::fetch<TILE>(to.keys, keys, keys_view.token, rows, c.n);
            Rows<P>::fetch<TILE>(to.values, values, values_view.token, rows, c.p);
            if (threadIdx.x < TILE / 4) copy_async_16(to.scale + threadIdx.x * 4, planes, true);
            if (threadIdx.x == 0) copy_async_16(to.last, totals, true);
            keys += keys_ahead, values += values_ahead, planes += ahead * TILE, totals += ahead * TILE;
            rows = leftward || s + 2 < tiles ? TILE : (int)(c.length - (i64)(tiles - 1) * TILE);
        }
        copy_async_commit();
    };
    for (int s = 0; s < STAGES - 1; s++) fetch(s);

    const int own = warp_of_block() * 16, q = threadIdx.x % 4;
    const bool holds = own < N;
    float state[P / 16][2][4] = {};
    if (outside && holds) move_state<true>(state, (float *)outside + matrix, c);
    bits16 *to = c.states + (((b * c.tiles + start) * c.H + h) * KINDS + kind) * STATE;
    to += (own + row_of_lane()) * P + q / 2 * 8;
    for (int s = 0; s < tiles; s++, to += ahead * c.H * KINDS * STATE) {
#pragma unroll
        for (int p = 0; p < P; p += 16) {
            const uint4 eight = neighbours(state[p / 16]);
            if (holds && (s || outside)) *(uint4 *)(to + p) = eight;
        }
        if (s == steps) break;
        copy_async_wait<STAGES - 2>();
        publish_copies();
        __syncthreads();
        fetch(s + STAGES - 1);
        if (!holds) continue;
        const WalkStage &at = stages[s % STAGES];
        unsigned keys_left[TILE / 16][4];
#pragma unroll
        for (int t = 0; t < TILE / 16; t++) Rows<N>::left_transposed(keys_left[t], at.keys, t * 16, own);
        const float total = at.last[3];
#pragma unroll
        for (int e = 0; e < P / 2; e++) state[e / 8][e / 4 % 2][e % 4] *= total;
#pragma unroll
        for (int e = 0; e < TILE / 4; e++) {
            unsigned &k = keys_left[e / 4][e % 4];
            const float2 scale = *(const float2 *)(at.scale + e / 4 * 16 + e / 2 % 2 * 8 + 2 * q);
            const float2 pair = unpack2<OPERAND>(k);
            k = pack2<OPERAND>(pair.x * scale.x, pair.y * scale.y);
        }
        add_rows<P, P, TILE / 16, true>(state, keys_left, at.values, 0);
        finish_products<P / 16>(state);
    }
    if (last && holds) move_state<false>(state, last + matrix, c);
}

// What the tokens of a tile make of its log-decays
struct alignas(16) Paths {
    float pairs[WARPS][TILE];  // of the pairs of a warp's senders with each receiver; within the warp, forward ones
    float pairs_back[TILE];    // and backward ones
    float all[TILE], ahead[TILE], itself[TILE];  // of a sender's pairs, per unit of its dt; those to the right; its own
    float borders[KINDS][TILE];  // by kind, what a token receives, or per unit of its dt sends, through a border
    float step[TILE], crossing[WARPS];
};

struct alignas(1024) Stage {
    bits16 x[TILE * Rows<P>::PITCH], dy[TILE * Rows<P>::PITCH], states[KINDS][N * Rows<P>::PITCH];
    alignas(16) float planes[SCALE][TILE];
};

struct Shared {
    bits16 B[TILE * Rows<N>::PITCH], C[TILE * Rows<N>::PITCH];
    uint4 products[TILE / 16][THREADS];  // S^T, each thread's own; at the end dS^T
    Stage stages[BUFFERS];
    Paths paths[2];
    float4 dS[2][THREADS];  // each thread's own, of the last receivers, for which registers are too few
};

INLINE void load_kept(float (*v)[4], const float4 (*from)[THREADS]) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float4 four = from[e][threadIdx.x];
        v[e][0] = four.x, v[e][1] = four.y, v[e][2] = four.z, v[e][3] = four.w;
    }
}
INLINE void store_kept(const float (*v)[4], float4 (*to)[THREADS]) {
#pragma unroll
    for (int e = 0; e < 2; e++) to[e][threadIdx.x] = make_float4(v[e][0], v[e][1], v[e][2], v[e][3]);
}

// Gradients of a head's dt, and its tile's share of those of A and the bias, by one warp
INLINE void finish(const Call &c, const Paths &paths, i64 b, i64 tile, i64 h) {
    const int lane = threadIdx.x % 32, first = lane * EACH;
    const auto load = [&](const float *v) { return Each::load(v + first); };
    const Each all = load(paths.all), forth = load(paths.ahead), step = load(paths.step);
    // sums of paths that end at a token or, negative, begin there
    Each ahead = load(paths.borders[STATE_RIGHT]), back = {}, behind = {};
    Each sent = load(paths.borders[COSTATE_LEFT]), unit = load(paths.itself);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        ahead.v[j] -= step.v[j] * forth.v[j];
        unit.v[j] += all.v[j] + sent.v[j];
        sent.v[j] *= step.v[j];
    }
    if (BOTH) {
        const Each leaving = load(paths.borders[KINDS - 1]), pairs = load(paths.pairs_back);
        behind = load(paths.borders[KINDS - 2]);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            unit.v[j] += leaving.v[j];
            back.v[j] = step.v[j] * (leaving.v[j] + all.v[j] - forth.v[j]) - pairs.v[j];
        }
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (!BOTH && w > first / 16) continue;
        const Each pairs = load(paths.pairs[w]);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            ahead.v[j] += w <= first / 16 ? pairs.v[j] : 0.f;
            back.v[j] -= w <= first / 16 ? 0.f : pairs.v[j];
        }
    }
    float from_left[EACH], from_right[EACH];
    const float next = __shfl_down_sync(~0u, back.v[0], 1), before = __shfl_up_sync(~0u, sent.v[EACH - 1], 1);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        from_left[j] = ahead.v[j] + (j < EACH - 1 ? back.v[j < EACH - 1 ? j + 1 : j] : lane < 31 ? next : 0.f);
        from_right[j] = behind.v[j] + (j ? sent.v[j ? j - 1 : 0] : lane ? before : 0.f);
    }
    if (lane == 0)
        for (int w = 0; w < WARPS; w++) from_right[0] += paths.crossing[w];
    scan_of_warp<EACH>(from_left, true);
    scan_of_warp<EACH>(from_right, false);
    const float A = c.A[h];
    float dA = 0.f, dbias = 0.f;
    const i64 token0 = tile * TILE + first;
    const int rows = (int)min(max(c.length - token0, 0LL), (i64)EACH);
    char *const to = c.ddt + ((b * c.length + token0) * c.ddt_row + h) * (DT_TYPE ? 2 : 4);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float decay = from_left[j] + from_right[j];
        const float slope = SOFTPLUS ? softplus_slope(step.v[j]) : 1.f, grad = (unit.v[j] + A * decay) * slope;
        if (j < rows) {
            encode<DT_TYPE>(to, j * c.ddt_row, grad);
            dA += decay * step.v[j], dbias += grad;
        }
    }
    // half of the lanes sum one, half the other
    const bool upper = lane & 16;
    float sum = (upper ? dbias : dA) + __shfl_xor_sync(~0u, upper ? dA : dbias, 16);
#pragma unroll
    for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (lane % 16 == 0) (upper ? c.dbias : c.dA)[(b * c.tiles + tile) * c.H + h] = sum;
}

INLINE void gradients(const Call &c) {
    Shared &shared = *(Shared *)dynamic_shared();
    const i64 heads = c.H / c.groups, part = blockIdx.x % c.parts, group = blockIdx.x / c.parts % c.groups;
    const i64 tile = blockIdx.x / c.parts / c.groups % c.tiles, b = blockIdx.x / c.parts / c.groups / c.tiles;
    const int begin = (int)(group * heads + part * c.part);
    const int end = (int)(group * heads + min((part + 1) * c.part, heads));
    const i64 token0 = tile * TILE, padded = c.tiles * TILE, plane = c.batch * c.H * padded;
    const int rows = (int)min(c.length - token0, (i64)TILE);
    const int warp = warp_of_block(), lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, own = warp * 16;
    // which states there are: none enters the sequence unless it is given
    const bool from_left = tile > 0, from_right = tile < c.tiles - 1;
    const bool present[4] = {c.walked && (from_left || c.initial), c.walked && (from_right || c.gradient),
                             c.walked && (from_right || c.initial), c.walked && (from_left || c.gradient)};

    // addresses are formed again for each head, which costs less than to keep them in registers
    const char *const x = c.x + b * c.x_view.batch + token0 * c.x_view.token;
    const char *const dy = c.dy + b * c.dy_view.batch + token0 * c.dy_view.token;
    const bits16 *const states = c.states + (b * c.tiles + tile) * c.H * KINDS * STATE;
    const float *const planes = c.planes + b * c.H * padded + token0;
    const auto fetch = [&](int h) {
        if (h < end) {
            Stage &to = shared.stages[(h - begin) % BUFFERS];
            const unsigned thread = opaque(threadIdx.x), own = thread % 32 * 4;
            const unsigned row = thread / Rows<P>::CHUNKS, chunk = thread % Rows<P>::CHUNKS * 16;
            const char *const x_own = x + h * c.x_view.head + (row * (unsigned)c.x_view.token + chunk);
            const char *const dy_own = dy + h * c.dy_view.head + (row * (unsigned)c.dy_view.token + chunk);
            const char *const states_own = (const char *)(states + h * KINDS * STATE) + (row * (P * 2) + chunk);
            Rows<P>::fetch<TILE>(to.x, x_own, c.x_view.token, rows, c.p);
            Rows<P>::fetch<TILE>(to.dy, dy_own, c.dy_view.token, rows, c.p);
#pragma unroll
            for (int kind = 0; kind < KINDS; kind++)
                if (present[kind]) Rows<P>::fetch<N>(to.states[kind], states_own + kind * STATE * 2, P * 2, N, P);
            if (warp < SKIP + HAS_D && own < TILE)
                copy_async_16(to.planes[warp] + own, planes + warp * plane + h * padded + own, true);
        }
        copy_async_commit();
    };
    const char *B = c.B + b * c.B_view.batch + token0 * c.B_view.token + group * c.B_view.head;
    const char *C = c.C + b * c.C_view.batch + token0 * c.C_view.token + group * c.C_view.head;
    Rows<N>::fetch<TILE>(shared.B, B + Rows<N>::own(c.B_view.token), c.B_view.token, rows, c.n);
    Rows<N>::fetch<TILE>(shared.C, C + Rows<N>::own(c.C_view.token), c.C_view.token, rows, c.n);
    copy_async_commit();
    fetch(begin);
    copy_async_wait<1>();
    publish_copies();
    __syncthreads();

    // receivers by 32, those of the four warps' own 64 tokens first
    constexpr int BLOCKS = TILE / 32;
    const int four = warp / 4 * 4;
    unsigned left_B[N / 16][4];
    Rows<N>::left(left_B, shared.B, own);
    // kept in float16, whose mantissa is 3 bits longer than bfloat16's, times 2^lift of the sender's row, below 2^15
    float lift[2] = {}, most[2] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        const float scale[2] = {power_of_2(lift[0]), power_of_2(lift[1])};
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) {
            float S[2][2][4];
            set_columns<N, 32, N / 16>(S, left_B, shared.C, (four + 2 * k) % (TILE / 16) * 16);
            finish_products<2>(S);
#pragma unroll
            for (int u = 0; u < 2; u++) {
                unsigned packed[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float *const pair = S[u][e / 2] + e % 2 * 2;
                    if (!pass) most[e % 2] = fmaxf(most[e % 2], fmaxf(fabsf(pair[0]), fabsf(pair[1])));
                    packed[e] = pack2<KEPT>(pair[0] * scale[e % 2], pair[1] * scale[e % 2]);
                }
                if (pass)
                    shared.products[2 * k + u][threadIdx.x] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            for (int mask = 1; mask < 4; mask *= 2) most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], mask));
            lift[r] = (float)max(-114, min(100, 141 - (int)(__float_as_uint(most[r]) >> 23)));
        }
    }

    bits16 *const dx_tile = (bits16 *)c.dx + (b * c.length + token0) * c.dx_row;
    constexpr int LAST = 2 * BLOCKS - 1;
    shared.dS[0][threadIdx.x] = shared.dS[1][threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    float dS[LAST][2][4] = {}, dB[N / 16][2][4] = {}, dC[N / 16][2][4] = {};
    for (int h = begin; h < end; h++) {
        if (BUFFERS == 1 && h > begin) {
            __syncthreads();
            fetch(h);
        }
        copy_async_wait<0>();
        publish_copies();
        __syncthreads();
        if (h > begin && warp == (h - begin) % WARPS) finish(c, shared.paths[(h - begin - 1) % 2], b, tile, h - 1);
        if (BUFFERS == 2) fetch(h + 1);
        const Stage &at = shared.stages[(h - begin) % BUFFERS];
        Paths &paths = shared.paths[(h - begin) % 2];
        const float *left = at.planes[FROM_LEFT], *right = at.planes[TO_RIGHT];
        const bool upper = lane & 16, odd = lane & 8, last = lane & 4;
        float *const pairs = paths.pairs[warp] + odd * 8 + 2 * q + last;
        const float step[2] = {at.planes[STEP][own + g], at.planes[STEP][own + 8 + g]};
        const float lifted[2] = {step[0] * power_of_2(lift[0]), step[1] * power_of_2(lift[1])};
        const auto to_border = [&](int kind, int r) {  // decay from or to a token
            const int t = own + r * 8 + g;
            if (kind == STATE_RIGHT) return exp2_fast(left[t]);
            if (kind == STATE_LEFT) return exp2_fast(right[t]);
            if (kind == COSTATE_LEFT) return t < TILE - 1 ? exp2_fast(right[t + 1]) : 1.f;
            return t ? exp2_fast(left[t - 1]) : 1.f;
        };

        // dx of what leaves the tile
        float dx[P / 16][2][4] = {};
        if (present[COSTATE_LEFT] || (BOTH && present[KINDS - 1])) {
            unsigned a[N / 16][4];
            Rows<N>::left(a, shared.B, own);
#pragma unroll
            for (int kind = COSTATE_LEFT; kind < KINDS; kind += 2) {
                if (!present[kind]) continue;
                float v[P / 16][2][4];
                add_rows<P, P, N / 16, false>(v, a, at.states[kind], 0);
                const float scale[2] = {to_border(kind, 0), to_border(kind, 1)};
                finish_products<P / 16>(v);
#pragma unroll
                for (int e = 0; e < P / 2; e++)
                    dx[e / 8][e / 4 % 2][e % 4] += scale[e / 2 % 2] * v[e / 8][e / 4 % 2][e % 4];
            }
        }

        // pairs inside the tile, two blocks of receivers at once
        float all[2] = {}, ahead[2] = {}, itself[2] = {};  // sums over other tokens, over those to the right; its own
#pragma unroll
        for (int k0 = 0; k0 < 2 * BLOCKS; k0 += 2) {
            const int i0 = (four + k0) % (TILE / 16), i[2] = {i0, i0 + 1};
            if (!BOTH && i0 + 1 < four) continue;
            float G[2][2][4];
            unsigned x_left[P / 16][4];
            Rows<P>::left(x_left, at.x, own);
            set_columns<P, 32, P / 16>(G, x_left, at.dy, i0 * 16);
            finish_products<2>(G);
            unsigned W[2][4];
            float column[8] = {};  // sums over rows: [block of receivers * 4 + column block * 2 + column]
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const uint4 packed = shared.products[k0 + u][threadIdx.x];
                const unsigned S[4] = {packed.x, packed.y, packed.z, packed.w};  // [column block * 2 + row]
                if (k0 > 2 || i[u] != warp) {
                    const float *border = i[u] > warp ? left : right;
                    const float is_forward = i[u] > warp ? 1.f : 0.f;
                    float row[2] = {};
                    const float from[2] = {border[own + g] + lift[0], border[own + 8 + g] + lift[1]};
                    float kept[2][4];
                    if (k0 + u == LAST) load_kept(kept, shared.dS);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int block = e / 2, r = e % 2;
                        const float2 to = *(const float2 *)(border + i[u] * 16 + block * 8 + 2 * q);
                        const float2 s = unpack2<KEPT>(S[e]);
                        float m[2] = {exp2_fast(to.x - from[r]), exp2_fast(to.y - from[r])};
                        const float pair[2] = {s.x, s.y};
                        float w[2];
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            if (!BOTH) m[f] *= is_forward;
                            const float mG = m[f] * G[u][block][r * 2 + f], product = mG * pair[f];
                            w[f] = m[f] * pair[f];
                            row[r] += product;
                            (k0 + u == LAST ? kept : dS[min(k0 + u, LAST - 1)])[block][r * 2 + f] += lifted[r] * mG;
                            column[u * 4 + block * 2 + f] += step[r] * product;
                        }
                        W[u][e] = pack2<OPERAND>(w[0], w[1]);
                    }
#pragma unroll
                    for (int r = 0; r < 2; r++) all[r] += row[r], ahead[r] += is_forward * row[r];
                    if (k0 + u == LAST) store_kept(kept, shared.dS);
                } else {
                    float column_back[4] = {}, kept[2][4];
                    if (BLOCKS == 2 && k0 + u == LAST) load_kept(kept, shared.dS);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int block = e / 2, r = e % 2;
                        const float2 s = unpack2<KEPT>(S[e]);
                        const float pair[2] = {s.x, s.y};
                        float w[2];
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            const int from = own + r * 8 + g, to = own + block * 8 + 2 * q + f;
                            const float *border = to > from ? left : right;
                            const float product = G[u][block][r * 2 + f];
                            const float path_decay = to == from ? 0.f : border[to] - border[from];
                            const float decay = BOTH || to >= from ? exp2_fast(path_decay - lift[r]) : 0.f;
                            const float m = to == from ? DIAGONAL * decay : decay;
                            const float mG = m * product, d = lifted[r] * mG, path = step[r] * (mG * pair[f]);
                            w[f] = m * pair[f];
                            if (BLOCKS > 2) dS[min(k0 + u, LAST - 1)][block][r * 2 + f] += d;
                            else (k0 + u == LAST ? kept : dS[min(k0 + u, LAST - 1)])[block][r * 2 + f] += d;
                            if (to > from) ahead[r] += mG * pair[f], column[u * 4 + block * 2 + f] += path;
                            if (to < from) column_back[block * 2 + f] += path;
                            if (to == from) itself[r] += mG * pair[f];
                            else all[r] += mG * pair[f];
                            if (HAS_D && to == from && to < rows)
                                c.dD[(b * c.length + token0 + to) * c.H + h] = product;
                        }
                        W[u][e] = pack2<OPERAND>(w[0], w[1]);
                    }
                    if (BLOCKS == 2 && k0 + u == LAST) store_kept(kept, shared.dS);
                    if (BOTH) {
                        const float sum = sum_of_column(column_back, odd, last);
                        paths.pairs_back[own + odd * 8 + 2 * q + last] = sum + __shfl_xor_sync(~0u, sum, 16);
                    }
                }
            }
            // each level of the sum over 8 lanes keeps one half of the columns
            float half[4];
#pragma unroll
            for (int f = 0; f < 4; f++) {
                const float keep = upper ? column[4 + f] : column[f], give = upper ? column[f] : column[4 + f];
                half[f] = keep + __shfl_xor_sync(~0u, give, 16);
            }
            pairs[(upper ? i[1] : i[0]) * 16] = sum_of_column(half, odd, last);
            add_rows<P, P, 2, true>(dx, W, at.dy, i0 * 16);
        }
        finish_products<P / 16>(dx);
        const float sums[3] = {sum_of_row(all), sum_of_row(ahead), sum_of_row(itself)};
        if (q < 2) {
            const int t = own + q * 8 + g;
            paths.all[t] = sums[0], paths.ahead[t] = sums[1], paths.itself[t] = sums[2];
            paths.step[t] = q ? step[1] : step[0];
        }
        const unsigned diagonal[4] = {HAS_D ? on_diagonal(at.planes[SKIP][own + g]) : 0, 0, 0,
                                      HAS_D ? on_diagonal(at.planes[SKIP][own + 8 + g]) : 0};
        const int row = own + row_of_lane(), column = opaque(threadIdx.x) % 4 / 2 * 8;
        bits16 *const dx_to = dx_tile + h * c.p + (row * c.dx_row + column);
#pragma unroll
        for (int p = 0; p < P; p += 16) {
#pragma unroll
            for (int e = 0; e < 8; e++) dx[p / 16][e / 4][e % 4] *= step[e / 2 % 2];
            if (HAS_D) {
                unsigned b[4];
                Rows<P>::right(b, at.dy, own, p);
                multiply(dx[p / 16], diagonal, b);
            }
            const uint4 eight = neighbours(dx[p / 16]);
            if (row < rows && p + column < c.p) *(uint4 *)(dx_to + p) = eight;
        }

        // dB of what leaves the tile, dC of what enters it
#pragma unroll
        for (int j = 0; j < KINDS; j++) {
            const int kind = j < KINDS / 2 ? 2 * j + 1 : 2 * j - KINDS;
            const bool sends = kind % 2;
            if (!present[kind]) {
                if (lane < 16) paths.borders[kind][own + lane] = 0.f;
                continue;
            }
            float v[N / 16][2][4];
            unsigned a[P / 16][4];
            Rows<P>::left(a, sends ? at.x : at.dy, own);
            set_columns<P, N, P / 16>(v, a, at.states[kind], 0);
            const float scale[2] = {to_border(kind, 0), to_border(kind, 1)};
            const float factor[2] = {scale[0] * (sends ? step[0] : 1.f), scale[1] * (sends ? step[1] : 1.f)};
            unsigned keys[N / 16][4];
            Rows<N>::left(keys, sends ? shared.B : shared.C, own);
            finish_products<N / 16>(v);
            float top[4] = {}, low[4] = {};  // keys times v transposed, of rows 0 to 7, 8 to 15, for its diagonal
#pragma unroll
            for (int n = 0; n < N / 16; n++) {
                unsigned rows[2][2];  // of v, as right factors
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float *const pair = v[n][e % 2] + e / 2 * 2;
                    rows[e / 2][e % 2] = pack2<OPERAND>(pair[0], pair[1]);
                }
                mma_16x8x16<OPERAND>(top, keys[n], rows[0]);
                mma_16x8x16<OPERAND>(low, keys[n], rows[1]);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    (sends ? dB : dC)[n][e / 4][e % 4] += factor[e / 2 % 2] * v[n][e / 4][e % 4];
            }
            const float dot[2] = {scale[0] * on_diagonal(top[0], top[1]), scale[1] * on_diagonal(low[2], low[3])};
            const float sum = sum_of_row(dot);
            if (q < 2) paths.borders[kind][own + q * 8 + g] = sum;
        }

        // what crosses it: the trace of a state times a transposed costate, by blocks of 16 rows
        float crossing = 0.f;
#pragma unroll 1
        for (int j = warp; j < N / 16 * (KINDS / 2); j += WARPS) {
            const int kind = j / (N / 16) * 2, row = j % (N / 16) * 16;
            if (!(kind ? present[KINDS - 2] && present[KINDS - 1] : present[0] && present[1])) continue;
            float v[2][4] = {};
#pragma unroll
            for (int p = 0; p < P; p += 16) {
                unsigned a[4], b[4];
                Rows<P>::left(a, at.states[kind], row, p);
                Rows<P>::right_transposed(b, at.states[kind + 1], row, p);
                multiply(v, a, b);
            }
            crossing += on_diagonal(v[0][0] + v[1][2], v[0][1] + v[1][3]);
        }
        crossing = sum_of_warp(crossing) * exp2_fast(left[TILE - 1]);
        if (lane == 0) paths.crossing[warp] = crossing;
    }
    __syncthreads();
    if (warp == 0) finish(c, shared.paths[(end - begin - 1) % 2], b, tile, end - 1);

    // dS^T lies in senders' rows, so its transpose is what others left
    bits16 *const senders = (bits16 *)shared.products;
#pragma unroll
    for (int k = 0; k < 2 * BLOCKS; k++) {
        const int i = (four + k) % (TILE / 16);
        unsigned a[4];
        float kept[2][4];
        if (k == LAST) load_kept(kept, shared.dS);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float *pair = (k == LAST ? kept : dS[min(k, LAST - 1)])[e / 2] + e % 2 * 2;
            a[e] = pack2<OPERAND>(pair[0], pair[1]);
            *(unsigned *)(senders + Rows<TILE>::at(own + e % 2 * 8 + g, i * 2 + e / 2) + 2 * q) = a[e];
        }
        add_rows<N, N, 1, true>(dB, &a, shared.C, i * 16);
        finish_products<N / 16>(dB);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2 * BLOCKS; j++) {
        unsigned a[4];
        Rows<TILE>::left_transposed(a, senders, j * 16, own);
        add_rows<N, N, 1, true>(dC, &a, shared.B, j * 16);
        finish_products<N / 16>(dC);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int t = own + r * 8 + g;
        if (t >= rows) continue;
        const i64 to = ((part * c.batch + b) * c.length + token0 + t) * c.dBC_row + group * c.n + 2 * q;
#pragma unroll
        for (int e = 0; e < N / 8; e++) {
            if (e * 8 >= c.n) continue;
            const float *one = dB[e / 2][e % 2] + r * 2, *other = dC[e / 2][e % 2] + r * 2;
            if (PARTIAL) {
                *(float2 *)((float *)c.dB + to + e * 8) = make_float2(one[0], one[1]);
                *(float2 *)((float *)c.dC + to + e * 8) = make_float2(other[0], other[1]);
            } else {
                *(unsigned *)((bits16 *)c.dB + to + e * 8) = pack2<OPERAND>(one[0], one[1]);
                *(unsigned *)((bits16 *)c.dC + to + e * 8) = pack2<OPERAND>(other[0], other[1]);
            }
        }
    }
}

// First the parts of dB and dC, if any, two neighbours a thread; then rows of dA and dbias, 32 heads a block
INLINE void sums(const Sum &c) {
    const i64 blocks = PARTIAL ? ROUND_UP(c.inner / 2, THREADS) : 0;
    i64 block = blockIdx.x;
    if (block < 2 * blocks) {
        const float *in = block < blocks ? c.dB_parts : c.dC_parts;
        unsigned *out = block < blocks ? c.dB : c.dC;
        const i64 i = (block - (block < blocks ? 0 : blocks)) * THREADS + threadIdx.x;
        if (i * 2 >= c.inner) return;
        float2 total = make_float2(0.f, 0.f);
        for (i64 j = 0; j < c.parts; j++) {
            const float2 v = *(const float2 *)(in + j * c.inner + i * 2);
            total.x += v.x, total.y += v.y;
        }
        out[i / c.pairs * c.row + i % c.pairs] = pack2<OPERAND>(total.x, total.y);
        return;
    }
    __shared__ float partial[WARPS][33];
    block -= 2 * blocks;
    const i64 of_heads = ROUND_UP(c.H, 32), h = block % of_heads * 32 + threadIdx.x % 32;
    const float *in = block < of_heads ? c.dA_rows : c.dbias_rows;
    float total = 0.f;
    if (h < c.H) {
#pragma unroll 8
        for (i64 j = threadIdx.x / 32; j < c.rows; j += WARPS) total += in[j * c.H + h];
    }
    partial[threadIdx.x / 32][threadIdx.x % 32] = total;
    __syncthreads();
    if (threadIdx.x >= 32 || h >= c.H) return;
    for (int w = 1; w < WARPS; w++) total += partial[w][threadIdx.x];
    (block < of_heads ? c.dA : c.dbias)[h] = total;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }
