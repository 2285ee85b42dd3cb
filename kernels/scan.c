/* The selective scan on the CPU: forward and backward, any scan order, any strides, float32, bfloat16 and float16.
 *
 * A task walks one block of 16 channels through time with the state in registers. Tiles of TILE steps are staged in
 * local arrays: staging is where the scan order, the strides and the element type are dealt with, so the arithmetic
 * below sees only float vectors, one lane a channel. Lanes past the last channel hold zeros. B and C are read in place
 * where their states are consecutive floats, and packed that way first where they are not.
 *
 * Needs GCC or Clang (vector extensions); OpenMP is used if enabled. Called by cpu.py through ctypes. */

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#define LANES 16
#define TILE 16
#define FORWARD_TILE 64
#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.44269504088896f
#define LN2 0.693147180559945f

/* GCC compiles PER_CPU functions for several instruction sets, and the loader takes the best one. A PER_CPU_TASK has a
 * function of its own for AVX-512, which can look up 16 lanes in a register of 16. Elsewhere the flags decide. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__)
#define PER_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define PER_CPU_TASK __attribute__((target_clones("arch=x86-64-v3", "default")))
#define AVX512 __attribute__((target("arch=x86-64-v4")))
#define LOOKUP(table, indices) __builtin_shuffle(table, indices)
#else
#define PER_CPU __attribute__((noinline))
#define PER_CPU_TASK
#endif

#if defined(__x86_64__)
#define FLUSH_DENORMALS unsigned saved_csr = __builtin_ia32_stmxcsr(); __builtin_ia32_ldmxcsr(saved_csr | 0x8040)
#define RESTORE_DENORMALS __builtin_ia32_ldmxcsr(saved_csr)
#else
#define FLUSH_DENORMALS
#define RESTORE_DENORMALS
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* axes: batch, token, scan, channel (or state); strides in elements */
typedef struct { void *data; int64_t stride[4]; int64_t dtype; } Array;

/* What cpu.py packs: 8 bytes a field, in this order; null where a call has no such tensor */
typedef struct {
    int64_t batch, length, scans, channels, states, x_scans, threads, softplus, merge, splits;
    Array x, delta, B, C, y; /* y: the output, or the gradient of it */
    Array dx, ddelta;
    const float *A, *D, *bias, *initial;
    const int32_t *order;
    float *packed_B, *packed_C; /* (batch, length, scans, states), used where B or C cannot be read in place */
    float *state;
    const float *dstate_last;
    float *dA, *dB, *dC, *dD, *dbias, *dinitial, *starts;
} Call;

/* ---------------------------------------------------------------- elements */

INLINE float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.f : 1.f) * (float)mantissa * 0x1p-24f;
    return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

INLINE uint16_t float_to_half(float f) {
    uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: let the adder round to multiples of 2^-24 */
        float rounded = bits_to_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(rounded) - 0x3f000000));
    }
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

INLINE float load(const Array *a, int64_t i) {
    if (a->dtype == FLOAT32) return ((const float *)a->data)[i];
    uint16_t bits = ((const uint16_t *)a->data)[i];
    return a->dtype == BFLOAT16 ? bits_to_float((uint32_t)bits << 16) : half_to_float(bits);
}

INLINE void store(const Array *a, int64_t i, float f) {
    if (a->dtype == FLOAT32) { ((float *)a->data)[i] = f; return; }
    uint32_t bits = float_to_bits(f);
    uint16_t bf16 = f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    ((uint16_t *)a->data)[i] = a->dtype == BFLOAT16 ? bf16 : float_to_half(f);
}

/* ------------------------------------------------------------------- tiles */

INLINE vfloat get(const float *p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
INLINE void put(float *p, vfloat v) { memcpy(p, &v, sizeof v); }
INLINE vfloat all(float f) { return f - (vfloat){0}; }
INLINE vfloat pick(vint mask, vfloat a, vfloat b) { return (vfloat)((mask & (vint)a) | (~mask & (vint)b)); }
INLINE vfloat vabs(vfloat v) { return (vfloat)((vint)v & 0x7fffffff); }
INLINE vfloat at_least(float low, vfloat v) { return pick(v < low, all(low), v); } /* a NaN stays one */

/* 16 consecutive elements */
INLINE vfloat load_vector(const Array *a, int64_t i) {
    if (a->dtype == FLOAT32) return get((const float *)a->data + i);
    vhalf bits;
    memcpy(&bits, (const uint16_t *)a->data + i, sizeof bits);
    if (a->dtype == BFLOAT16) return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
    vfloat v;
    for (int j = 0; j < LANES; j++) v[j] = half_to_float(bits[j]);
    return v;
}

INLINE void store_vector(const Array *a, int64_t i, vfloat v) {
    if (a->dtype == FLOAT32) { put((float *)a->data + i, v); return; }
    vuint bits = (vuint)v;
    vhalf to = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, vhalf);
    to |= __builtin_convertvector(v != v, vhalf); /* all ones is a NaN in both types */
    if (a->dtype == FLOAT16)
        for (int j = 0; j < LANES; j++) to[j] = float_to_half(v[j]);
    memcpy((uint16_t *)a->data + i, &to, sizeof to);
}

/* v[i][j] -> v[j][i]; the first of two arguments of each step takes the lower halves of its groups */
#define L8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define H8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define L4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define H4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define L2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define H2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define L1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define H1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define SWAP(half, low, high)                                                  \
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) if (!(i & half)) {    \
        const vfloat a = v[i], b = v[i + half];                                \
        v[i] = SHUFFLE(a, b, low), v[i + half] = SHUFFLE(a, b, high);          \
    }
INLINE void transpose(vfloat v[16]) {
    SWAP(8, L8, H8)
    SWAP(4, L4, H4)
    SWAP(2, L2, H2)
    SWAP(1, L1, H1)
}

INLINE int consecutive(const int64_t *rows, int steps) {
    int64_t same = 1;
    for (int t = 1; t < steps; t++) same &= rows[t] == rows[0] + t;
    return (int)same;
}

/* tile[t][i] = a[base + rows[t] * stride_row + i * stride], zeros for i >= count; it has room for whole blocks of 16 */
PER_CPU static void load_tile(float *tile, const Array *a, int64_t base, const int64_t *rows, int steps, int count) {
    const int64_t stride = a->stride[3], row = a->stride[1];
    if (stride == 1 && count == LANES) {
        for (int t = 0; t < steps; t++) put(tile + t * LANES, load_vector(a, base + rows[t] * row));
        return;
    }
    if (row == 1 && consecutive(rows, steps)) {
        float lines[LANES][FORWARD_TILE]; /* whole runs of a channel first: that is what the caches prefetch */
        for (int i = 0; i < LANES; i++) {
            const int64_t from = base + rows[0] + i * stride;
            int t = 0;
            for (; i < count && t <= steps - LANES; t += LANES) put(lines[i] + t, load_vector(a, from + t));
            for (; i < count && t < steps; t++) lines[i][t] = load(a, from + t);
            for (; t % LANES || t < steps; t++) lines[i][t] = 0;
        }
        for (int t0 = 0; t0 < steps; t0 += LANES) {
            vfloat v[16];
            for (int i = 0; i < LANES; i++) v[i] = get(lines[i] + t0);
            transpose(v);
            for (int t = 0; t < LANES; t++) put(tile + (t0 + t) * LANES, v[t]);
        }
        return;
    }
    for (int t = 0; t < steps; t++) {
        for (int i = 0; i < count; i++) tile[t * LANES + i] = load(a, base + rows[t] * row + i * stride);
        for (int i = count; i < LANES; i++) tile[t * LANES + i] = 0;
    }
}

PER_CPU static void store_tile(const float *tile, const Array *a, int64_t base, const int64_t *rows, int steps,
                               int count, int add) {
    const int64_t stride = a->stride[3], row = a->stride[1];
    if (stride == 1 && count == LANES) {
        for (int t = 0; t < steps; t++) {
            const int64_t to = base + rows[t] * row;
            const vfloat v = get(tile + t * LANES);
            store_vector(a, to, add ? v + load_vector(a, to) : v);
        }
        return;
    }
    for (int t = 0; t < steps; t++)
        for (int i = 0; i < count; i++) {
            const int64_t to = base + rows[t] * row + i * stride;
            store(a, to, tile[t * LANES + i] + (add ? load(a, to) : 0.f));
        }
}

INLINE void scan_rows(int64_t *rows, const int32_t *order, int64_t t0, int steps) {
    for (int t = 0; t < steps; t++) rows[t] = order ? order[t0 + t] : t0 + t;
}

/* --------------------------------------------------------------- functions */

/* 2^(j/16) as bits, with j << 19 taken off: adding (16 i + j) << 19 gives 2^(i + j/16) */
#define POWERS                                                                                  \
    {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3,                       \
     0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,                       \
     0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,                       \
     0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d}

/* 2^v to 1e-7 relative, exact at 0, for |v| up to 126. `lookup`: a table of 16 in place of half of the polynomial. */
INLINE vfloat vexp2(vfloat v, const int lookup) {
#ifdef LOOKUP
    if (lookup) {
        const vfloat shifted = v + 0x1.8p19f, f = v - (shifted - 0x1.8p19f); /* v in sixteenths, and the rest */
        const vfloat power = (vfloat)(LOOKUP((vint)POWERS, (vint)shifted) + ((vint)shifted << 19));
        const vfloat p = (0x1.c6ac6ap-5f * f + 0x1.ebfff4p-3f) * f + 0x1.62e43p-1f;
        return power * f * p + power;
    }
#else
    (void)lookup;
#endif
    const vfloat shifted = v + 0x1.8p23f; /* rounds to the nearest integer, which lands in the low bits */
    const vfloat f = v - (shifted - 0x1.8p23f);
    vfloat p = 0x1.41d332p-13f * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e43p-1f;
    p = p * f + 1.f;
    return (vfloat)((vint)p + ((vint)shifted << 23));
}

/* the same for any v: results beyond 2^-126 and 2^127 become these */
INLINE vfloat vexp2_clamped(vfloat v) {
    v = at_least(-126.f, v);
    return vexp2(pick(v > 127.f, all(127.f), v), 0);
}

/* log(1 + e), 0 <= e <= 1, as 2 atanh(e / (2 + e)): relative accuracy down to the smallest e */
INLINE vfloat vlog1p(vfloat e) {
    const vfloat s = e / (e + 2.f), q = s * s;
    const vfloat p = ((0x1.1ed7bep-3f * q + 0x1.1ebd0ep-3f) * q + 0x1.99d208p-3f) * q + 0x1.555502p-2f;
    return 2.f * (s + s * q * p);
}

/* tile of delta: adds the bias, applies softplus, leaves its derivative in slope and, per lane, the largest |delta| in
 * peak */
PER_CPU static void activate(float *tile, float *slope, float *peak, int steps, const float *bias, int softplus) {
    vfloat largest = {0};
    for (int t = 0; t < steps; t++) {
        vfloat v = get(tile + t * LANES) + get(bias);
        if (softplus) {
            const vfloat e = vexp2(at_least(-126.f, -vabs(v) * LOG2E), 0);
            if (slope) put(slope + t * LANES, pick(v > 0.f, all(1.f), e) / (1.f + e));
            v = at_least(0.f, v) + vlog1p(e);
        } else if (slope) {
            put(slope + t * LANES, all(1.f));
        }
        largest = pick(vabs(v) <= largest, largest, vabs(v)); /* a NaN stays */
        put(tile + t * LANES, v);
    }
    put(peak, largest);
}

/* lane i of the result is the sum of v[i] over its lanes */
INLINE vfloat sum_lanes(vfloat v[16]) {
#define STEP(half, low, high) \
    for (int i = 0; i < half; i++) v[i] = SHUFFLE(v[i], v[i + half], low) + SHUFFLE(v[i], v[i + half], high);
    _Pragma("GCC unroll 8") STEP(8, L8, H8)
    _Pragma("GCC unroll 4") STEP(4, L4, H4)
    _Pragma("GCC unroll 2") STEP(2, L2, H2)
    STEP(1, L1, H1)
    return v[0];
}

/* -------------------------------------------------------------------- scan */

/* per-channel constants of one block: A in log2 units and the state, both [state][lane] */
INLINE void load_states(vfloat *to, const float *from, int count, int64_t N, float scale) {
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < LANES; i++) to[n][i] = from && i < count ? from[i * N + n] * scale : 0.f;
}

INLINE void store_states(float *to, const vfloat *from, int count, int64_t N) {
    for (int64_t n = 0; n < N; n++)
        for (int i = 0; i < count; i++) to[i * N + n] = from[n][i];
}

INLINE vfloat load_lanes(const float *from, int count) {
    vfloat v = {0};
    for (int i = 0; from && i < count; i++) v[i] = from[i];
    return v;
}

INLINE int64_t at(const Array *a, int64_t b, int64_t k, int64_t d) {
    return b * a->stride[0] + k * a->stride[2] + d * a->stride[3];
}

/* largest |A| of each lane */
INLINE vfloat fastest(const vfloat *A, int64_t N) {
    vfloat largest = {0};
    for (int64_t n = 0; n < N; n++) largest = pick(vabs(A[n]) <= largest, largest, vabs(A[n]));
    return largest;
}

/* whether every exponent of a tile is in the range of vexp2: nearly always, and it spares the clamps */
INLINE int in_range(vfloat fastest, const float *peak) {
    const vint inside = fastest * get(peak) < 125.f;
    int every = -1;
    for (int i = 0; i < LANES; i++) every &= inside[i];
    return every;
}

/* `states` states, at most 16, through one tile; y += C . h. B and C point at the first of them in token 0 */
INLINE void forward_steps(const float *x, const float *dt, float *y, const int64_t *rows, int steps, const float *B,
                          int64_t row_B, const float *C, int64_t row_C, const vfloat *A, vfloat *h, const int states,
                          const int clamp, const int lookup) {
    vfloat state[16];
    for (int n = 0; n < states; n++) state[n] = h[n];
    for (int t = 0; t < steps; t++) {
        const float *Bt = B + rows[t] * row_B, *Ct = C + rows[t] * row_C;
        const vfloat d = get(dt + t * LANES), du = d * get(x + t * LANES);
        vfloat out = get(y + t * LANES);
#pragma GCC unroll 16
        for (int n = 0; n < states; n++) {
            const vfloat a = clamp ? vexp2_clamped(d * A[n]) : vexp2(d * A[n], lookup);
            state[n] = a * state[n] + du * Bt[n];
            out += state[n] * Ct[n];
        }
        put(y + t * LANES, out);
    }
    for (int n = 0; n < states; n++) h[n] = state[n];
}

INLINE void forward_block(const Call *c, int64_t b, int64_t k, int64_t d0, const int lookup) {
    const int64_t L = c->length, N = c->states, channels = c->channels;
    const int count = channels - d0 < LANES ? (int)(channels - d0) : LANES;
    const int64_t per_channel = k * channels + d0, per_batch = b * c->scans * channels + per_channel;
    const int64_t row_B = c->B.stride[1], row_C = c->C.stride[1];
    const float *B = (const float *)c->B.data + at(&c->B, b, k, 0), *C = (const float *)c->C.data + at(&c->C, b, k, 0);
    vfloat A[N], h[N];
    load_states(A, c->A + per_channel * N, count, N, LOG2E);
    load_states(h, c->initial ? c->initial + per_batch * N : 0, count, N, 1.f);
    const vfloat D = load_lanes(c->D ? c->D + per_channel : 0, count), rate = fastest(A, N);
    float bias[LANES], peak[LANES];
    put(bias, load_lanes(c->bias ? c->bias + per_channel : 0, count));
    const int32_t *order = c->order ? c->order + k * L : 0;
    float x[FORWARD_TILE * LANES], dt[FORWARD_TILE * LANES], y[FORWARD_TILE * LANES];
    int64_t rows[FORWARD_TILE];

    for (int64_t t0 = 0; t0 < L; t0 += FORWARD_TILE) {
        const int steps = L - t0 < FORWARD_TILE ? (int)(L - t0) : FORWARD_TILE;
        scan_rows(rows, order, t0, steps);
        load_tile(x, &c->x, at(&c->x, b, c->x_scans == 1 ? 0 : k, d0), rows, steps, count);
        load_tile(dt, &c->delta, at(&c->delta, b, k, d0), rows, steps, count);
        activate(dt, 0, peak, steps, bias, (int)c->softplus);
        for (int t = 0; t < steps; t++) put(y + t * LANES, D * get(x + t * LANES));
        const int clamp = !in_range(rate, peak);
#define STEPS(states, clamp) \
    forward_steps(x, dt, y, rows, steps, B + n, row_B, C + n, row_C, A + n, h + n, states, clamp, lookup)
        for (int64_t n = 0; n < N; n += 16) {
            if (clamp) STEPS(N - n < 16 ? (int)(N - n) : 16, 1);
            else if (N - n >= 16) STEPS(16, 0);
            else if (N - n == 1) STEPS(1, 0);
            else STEPS((int)(N - n), 0);
        }
        store_tile(y, &c->y, at(&c->y, b, k, d0), rows, steps, count, c->merge && k > 0);
    }
    store_states(c->state + per_batch * N, h, count, N);
}

/* Adjoint of forward_block. With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}. */
INLINE void backward_block(const Call *c, int64_t b, int64_t k, int64_t d0, int split, vfloat *starts, const int N,
                           const int lookup) {
    const int64_t L = c->length, channels = c->channels, tiles = (L + TILE - 1) / TILE;
    const int count = channels - d0 < LANES ? (int)(channels - d0) : LANES;
    const int64_t per_channel = k * channels + d0, xk = c->x_scans == 1 ? 0 : k;
    const int64_t per_batch = b * c->scans * channels + per_channel;
    const int64_t row_B = c->B.stride[1], row_C = c->C.stride[1];
    const float *B = (const float *)c->B.data + at(&c->B, b, k, 0), *C = (const float *)c->C.data + at(&c->C, b, k, 0);
    vfloat A[N], h[N], dA[N];
    vfloat states[TILE * N], decays[TILE * N];
    load_states(A, c->A + per_channel * N, count, N, LOG2E);
    load_states(h, c->initial ? c->initial + per_batch * N : 0, count, N, 1.f);
    memset(dA, 0, sizeof dA);
    const vfloat D = load_lanes(c->D ? c->D + per_channel : 0, count), rate = fastest(A, N);
    float bias[LANES], peak[LANES];
    put(bias, load_lanes(c->bias ? c->bias + per_channel : 0, count));
    const int32_t *order = c->order ? c->order + k * L : 0;
    float x[TILE * LANES], dt[TILE * LANES], slope[TILE * LANES], dy[TILE * LANES];
    int64_t rows[TILE];

    for (int64_t tile = 0; tile < tiles; tile++) { /* the state at the start of every tile */
        const int64_t t0 = tile * TILE;
        const int steps = L - t0 < TILE ? (int)(L - t0) : TILE;
        memcpy(starts + tile * N, h, sizeof h);
        if (tile == tiles - 1) break;
        scan_rows(rows, order, t0, steps);
        load_tile(x, &c->x, at(&c->x, b, xk, d0), rows, steps, count);
        load_tile(dt, &c->delta, at(&c->delta, b, k, d0), rows, steps, count);
        activate(dt, 0, peak, steps, bias, (int)c->softplus);
        const int clamp = !in_range(rate, peak);
        for (int t = 0; t < steps; t++) {
            const float *Bt = B + rows[t] * row_B;
            const vfloat d = get(dt + t * LANES), du = d * get(x + t * LANES);
            if (clamp)
                for (int n = 0; n < N; n++) h[n] = vexp2_clamped(d * A[n]) * h[n] + du * Bt[n];
            else
#pragma GCC unroll 16
                for (int n = 0; n < N; n++) h[n] = vexp2(d * A[n], lookup) * h[n] + du * Bt[n];
        }
    }

    vfloat *g = h, dD = {0}, dbias = {0}; /* from here on h is the gradient that reaches the state from later steps */
    load_states(g, c->dstate_last ? c->dstate_last + per_batch * N : 0, count, N, 1.f);
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {
        const int64_t t0 = tile * TILE;
        const int steps = L - t0 < TILE ? (int)(L - t0) : TILE;
        const vfloat *start = starts + tile * N;
        scan_rows(rows, order, t0, steps);
        load_tile(x, &c->x, at(&c->x, b, xk, d0), rows, steps, count);
        load_tile(dt, &c->delta, at(&c->delta, b, k, d0), rows, steps, count);
        load_tile(dy, &c->y, at(&c->y, b, k, d0), rows, steps, count);
        activate(dt, slope, peak, steps, bias, (int)c->softplus);
        const int clamp = !in_range(rate, peak);
        for (int t = 0; t < steps; t++) {
            const float *Bt = B + rows[t] * row_B;
            const vfloat d = get(dt + t * LANES), du = d * get(x + t * LANES);
            const vfloat *before = t ? states + (t - 1) * N : start;
            vfloat *decay = decays + t * N, *after = states + t * N;
            if (clamp)
                for (int n = 0; n < N; n++) decay[n] = vexp2_clamped(d * A[n]);
            else
#pragma GCC unroll 16
                for (int n = 0; n < N; n++) decay[n] = vexp2(d * A[n], lookup);
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) after[n] = decay[n] * before[n] + du * Bt[n];
        }
        for (int t = steps - 1; t >= 0; t--) {
            const float *Bt = B + rows[t] * row_B, *Ct = C + rows[t] * row_C;
            const vfloat u = get(x + t * LANES), d = get(dt + t * LANES), du = d * u, out = get(dy + t * LANES);
            const vfloat *before = t ? states + (t - 1) * N : start;
            vfloat ddu = {0}, dlog = {0};
            const int64_t row = (((split * c->batch + b) * L + rows[t]) * c->scans + k) * N;
            for (int n0 = 0; n0 < N; n0 += 16) {
                vfloat toB[16] = {0}, toC[16] = {0};
                const int states_here = N - n0 < 16 ? N - n0 : 16;
#pragma GCC unroll 16
                for (int i = 0; i < states_here; i++) {
                    const int n = n0 + i;
                    const vfloat gn = g[n] + out * Ct[n], ga = gn * decays[t * N + n], w = ga * before[n];
                    toB[i] = gn * du;
                    toC[i] = out * states[t * N + n];
                    ddu += gn * Bt[n];
                    dlog += w * A[n];
                    dA[n] += w * d;
                    g[n] = ga;
                }
                const vfloat sumB = sum_lanes(toB), sumC = sum_lanes(toC);
                for (int i = 0; i < states_here; i++) {
                    c->dB[row + n0 + i] += sumB[i];
                    c->dC[row + n0 + i] += sumC[i];
                }
            }
            const vfloat ddelta = (ddu * u + dlog * LN2) * get(slope + t * LANES);
            dbias += ddelta;
            dD += out * u;
            put(x + t * LANES, ddu * d + D * out); /* x and dt now hold their gradients */
            put(dt + t * LANES, ddelta);
        }
        store_tile(x, &c->dx, at(&c->dx, b, k, d0), rows, steps, count, 0);
        store_tile(dt, &c->ddelta, at(&c->ddelta, b, k, d0), rows, steps, count, 0);
    }
    store_states(c->dinitial + per_batch * N, g, count, N);
    store_states(c->dA + per_batch * N, dA, count, N);
    for (int i = 0; i < count; i++) {
        c->dD[per_batch + i] = dD[i];
        c->dbias[per_batch + i] = dbias[i];
    }
}

/* N = 16 and 1 get their own unrolled code */
INLINE void backward_any(const Call *c, int64_t b, int64_t k, int64_t d0, int split, vfloat *starts, const int lookup) {
    if (c->states == 16) backward_block(c, b, k, d0, split, starts, 16, lookup);
    else if (c->states == 1) backward_block(c, b, k, d0, split, starts, 1, lookup);
    else backward_block(c, b, k, d0, split, starts, (int)c->states, lookup);
}

#ifdef AVX512
AVX512 static void forward_avx512(const Call *c, int64_t b, int64_t k, int64_t d0) { forward_block(c, b, k, d0, 1); }

AVX512 static void backward_avx512(const Call *c, int64_t b, int64_t k, int64_t d0, int split, vfloat *starts) {
    backward_any(c, b, k, d0, split, starts, 1);
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#else
#define forward_avx512 forward_task
#define backward_avx512 backward_task
#define has_avx512() 0
#endif

PER_CPU_TASK static void forward_task(const Call *c, int64_t b, int64_t k, int64_t d0) {
    forward_block(c, b, k, d0, 0);
}

PER_CPU_TASK static void backward_task(const Call *c, int64_t b, int64_t k, int64_t d0, int split, vfloat *starts) {
    backward_any(c, b, k, d0, split, starts, 0);
}

/* B or C with its states consecutive and in float: itself, or the packed copy that pack_task then fills */
static Array in_place(const Call *c, const Array *a, float *packed) {
    const int64_t row = c->scans * c->states;
    return packed ? (Array){packed, {c->length * row, row, c->states, 1}, FLOAT32} : *a;
}

static void pack_task(const Call *c, const Array *from, const Array *to, int64_t b, int64_t k, int64_t t0) {
    float tile[TILE * LANES];
    int64_t rows[TILE];
    const int steps = c->length - t0 < TILE ? (int)(c->length - t0) : TILE;
    scan_rows(rows, 0, t0, steps);
    for (int64_t n = 0; n < c->states; n += LANES) {
        const int count = c->states - n < LANES ? (int)(c->states - n) : LANES;
        load_tile(tile, from, at(from, b, k, n), rows, steps, count);
        store_tile(tile, to, at(to, b, k, n), rows, steps, count, 0);
    }
}

/* packs B and C where they need it, shared among the threads of the surrounding parallel region */
static void pack(const Call *given, const Call *c) {
    const int64_t tiles = (c->length + TILE - 1) / TILE, tasks = c->batch * c->scans * tiles;
    if (!c->packed_B && !c->packed_C) return;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task / tiles / c->scans, k = task / tiles % c->scans, t0 = task % tiles * TILE;
        if (c->packed_B) pack_task(c, &given->B, &c->B, b, k, t0);
        if (c->packed_C) pack_task(c, &given->C, &c->C, b, k, t0);
    }
}

void scan_forward(const Call *given) {
    Call call = *given, *c = &call;
    c->B = in_place(c, &given->B, c->packed_B), c->C = in_place(c, &given->C, c->packed_C);
    void (*const forward)(const Call *, int64_t, int64_t, int64_t) = has_avx512() ? forward_avx512 : forward_task;
    const int64_t blocks = (c->channels + LANES - 1) / LANES, inner = c->merge ? c->scans : 1;
    const int64_t tasks = c->batch * c->scans / inner * blocks; /* merged scans add up in one task, in order */
#pragma omp parallel num_threads((int)c->threads)
    {
        FLUSH_DENORMALS;
        pack(given, c);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t group = task / blocks, d0 = task % blocks * LANES;
            for (int64_t k = 0; k < inner; k++)
                forward(c, group * inner / c->scans, (group * inner + k) % c->scans, d0);
        }
        RESTORE_DENORMALS;
    }
}

void scan_backward(const Call *given) { /* starts: threads x tiles x states x LANES */
    Call call = *given, *c = &call;
    c->B = in_place(c, &given->B, c->packed_B), c->C = in_place(c, &given->C, c->packed_C);
    const int64_t blocks = (c->channels + LANES - 1) / LANES, tiles = (c->length + TILE - 1) / TILE;
    void (*const backward)(const Call *, int64_t, int64_t, int64_t, int, vfloat *) =
        has_avx512() ? backward_avx512 : backward_task;
    const int64_t splits = c->splits, tasks = c->batch * c->scans * splits;
#pragma omp parallel num_threads((int)c->threads)
    {
        vfloat *starts = (vfloat *)c->starts + omp_get_thread_num() * tiles * c->states;
        FLUSH_DENORMALS;
        pack(given, c);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t b = task / splits / c->scans, k = task / splits % c->scans, split = task % splits;
            for (int64_t block = split; block < blocks; block += splits)
                backward(c, b, k, block * LANES, (int)split, starts);
        }
        RESTORE_DENORMALS;
    }
}
