// The selective scan on NVIDIA GPUs: forward, checkpoints and backward, any scan order and strides.
//
// Compiled by cuda.py through NVRTC, once per state count and set of element types. A channel's N states are spread over
// SPLIT neighbouring lanes of STATES each; a block of 128 threads walks CHANNELS = 128 / SPLIT channels of one scan
// through time, in tiles of TILE steps staged in shared memory. Scan order, strides and element types are dealt with in
// staging; the next tile's loads are in flight while the present one is worked on.
//
// Macros: N, STATES, SPLIT, TILE; X_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, Y_TYPE, DX_TYPE (0 float, 1 bfloat16, 2 half);
// X_BY_TOKEN and so on: that tensor's tokens, not its channels, are neighbours in memory.

#define THREADS 128
#define WARPS (THREADS / 32)
#define CHANNELS (THREADS / SPLIT)
#define PADDED (STATES * SPLIT)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b))
#define PITCH (CHANNELS + 1)  // of a tile in shared memory: both ways of staging it miss most bank conflicts
#define PER_CHANNEL ROUND_UP(TILE * CHANNELS, THREADS)
#define PER_STATE ROUND_UP(TILE * PADDED, THREADS)

typedef long long i64;

struct Strided { void *data; i64 batch, token, scan, inner; };

struct Call {
    i64 batch, length, scans, channels;
    Strided x, delta, B, C, y;  // y: the output, or the gradient of it
    const float *A, *D, *bias, *initial;
    const int *order;
    float *last;     // last state; in the backward the gradient of it, or null
    float *starts;   // (batch, scans, tiles, channels, N): state before each tile
    void *dx, *ddelta;  // (batch, length, scans, channels)
    float *dA, *dB, *dC, *dD, *dbias, *dinitial;  // dB, dC: one partial sum a channel block
    int softplus, write_starts;
};

template <int TYPE> __device__ __forceinline__ float load(const void *p, i64 i) {
    if (TYPE == 0) return ((const float *)p)[i];
    unsigned short bits = ((const unsigned short *)p)[i];
    if (TYPE == 1) return __uint_as_float((unsigned)bits << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

template <int TYPE> __device__ __forceinline__ void store(void *p, i64 i, float f) {
    if (TYPE == 0) { ((float *)p)[i] = f; return; }
    unsigned short bits;
    if (TYPE == 1) {
        unsigned u = __float_as_uint(f);
        bits = f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    }
    ((unsigned short *)p)[i] = bits;
}

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// log(1 + e), 0 <= e <= 1, as 2 atanh(e / (2 + e)): relative accuracy down to the smallest e
__device__ __forceinline__ float log1p_small(float e) {
    float s = __fdividef(e, e + 2.f), q = s * s;
    float p = 1.f / 9 + q * (1.f / 11 + q * (1.f / 13 + q * (1.f / 15)));
    return 2.f * s * (1.f + q * (1.f / 3 + q * (1.f / 5 + q * (1.f / 7 + q * p))));
}

__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.f) + log1p_small(exp2_fast(-fabsf(v) * LOG2E)); }

__device__ __forceinline__ float sigmoid(float v) {
    float e = exp2_fast(-fabsf(v) * LOG2E);
    return __fdividef(v > 0 ? 1.f : e, 1.f + e);
}

struct Block {  // what this block works on
    i64 b, k, d0;
    const int *order;
    __device__ Block(const Call &c)
        : b(blockIdx.z), k(blockIdx.y), d0((i64)blockIdx.x * CHANNELS), order(c.order ? c.order + k * c.length : 0) {}
    __device__ i64 base(const Strided &a) const { return b * a.batch + k * a.scan; }
    // token visited at step t0 + threadIdx.x, for the threads that stage the tile's rows
    __device__ int row(const Call &c, i64 t0) const {
        const i64 t = min(max(t0 + threadIdx.x % TILE, 0LL), c.length - 1);
        return order ? order[t] : (int)t;
    }
};

// element i of a (TILE, CHANNELS) tile: neighbouring threads take neighbours in memory
struct Place {
    int t, d;
    __device__ Place(int i, bool by_token) {
        if (by_token) t = i % TILE, d = i / TILE;
        else t = i / CHANNELS, d = i % CHANNELS;
    }
};

// values[j] = element threadIdx.x + j * THREADS of the tile whose steps visit tokens rows[]. Loads are unconditional,
// so that all are in flight together; what lies outside is set to 0 by put_channels.
template <int TYPE, bool BY_TOKEN>
__device__ __forceinline__ void fetch_channels(float *values, const Call &c, const Block &at, const Strided &a,
                                               const int *rows) {
#pragma unroll
    for (int j = 0; j < PER_CHANNEL; j++) {
        const Place p(min(threadIdx.x + j * THREADS, TILE * CHANNELS - 1), BY_TOKEN);
        values[j] = load<TYPE>(a.data, at.base(a) + rows[p.t] * a.token + min(at.d0 + p.d, c.channels - 1) * a.inner);
    }
}

template <int TYPE, bool BY_TOKEN>
__device__ __forceinline__ void fetch_states(float *values, const Call &c, const Block &at, const Strided &a,
                                             const int *rows) {
#pragma unroll
    for (int j = 0; j < PER_STATE; j++) {
        const int i = min(threadIdx.x + j * THREADS, TILE * PADDED - 1);
        const int t = BY_TOKEN ? i % TILE : i / PADDED, n = BY_TOKEN ? i / TILE : i % PADDED;
        values[j] = load<TYPE>(a.data, at.base(a) + rows[t] * a.token + min(n, N - 1) * a.inner);
    }
}

template <bool BY_TOKEN>
__device__ __forceinline__ void put_channels(float *tile, const float *values, const Call &c, const Block &at, i64 t0) {
#pragma unroll
    for (int j = 0; j < PER_CHANNEL; j++) {
        const int i = threadIdx.x + j * THREADS;
        const Place p(i, BY_TOKEN);
        const bool inside = t0 + p.t < c.length && at.d0 + p.d < c.channels;
        if (i < TILE * CHANNELS) tile[p.t * PITCH + p.d] = inside ? values[j] : 0.f;
    }
}

template <bool BY_TOKEN>
__device__ __forceinline__ void put_states(float *tile, const float *values, const Call &c, i64 t0) {
#pragma unroll
    for (int j = 0; j < PER_STATE; j++) {
        const int i = threadIdx.x + j * THREADS;
        const int t = BY_TOKEN ? i % TILE : i / PADDED, n = BY_TOKEN ? i / TILE : i % PADDED;
        if (i < TILE * PADDED) tile[t * PADDED + n] = t0 + t < c.length && n < N ? values[j] : 0.f;
    }
}

// bias and softplus of fetched delta and, if asked, the slope of softplus; put_channels then zeroes steps past the end,
// where decay is 1 and input 0
__device__ __forceinline__ void activate(float *dt, float *slope, const Call &c, const Block &at) {
#pragma unroll
    for (int j = 0; j < PER_CHANNEL; j++) {
        const Place p(min(threadIdx.x + j * THREADS, TILE * CHANNELS - 1), DELTA_BY_TOKEN);
        const i64 d = min(at.d0 + p.d, c.channels - 1);
        const float v = dt[j] + (c.bias ? c.bias[at.k * c.channels + d] : 0.f);
        dt[j] = c.softplus ? softplus(v) : v;
        if (slope) slope[j] = c.softplus ? sigmoid(v) : 1.f;
    }
}

__device__ __forceinline__ float sum_split(float v) {
#pragma unroll
    for (int mask = 1; mask < SPLIT; mask <<= 1) v += __shfl_xor_sync(~0u, v, mask);
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) scan_forward(const Call c) {
    __shared__ float x[TILE * PITCH], dt[TILE * PITCH], y[TILE * PITCH];
    __shared__ int rows[3][TILE];  // of the present tile, the next and the one after
    __shared__ __align__(16) float B[TILE * PADDED], C[TILE * PADDED];
    const Block at(c);
    const int lane = threadIdx.x / SPLIT, part = threadIdx.x % SPLIT * STATES;
    const i64 d = at.d0 + lane, channel = at.k * c.channels + d;
    const bool alive = d < c.channels;
    const i64 state_at = (at.b * c.scans * c.channels + channel) * N + part;
    float A[STATES], h[STATES];
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        bool inside = alive && part + n < N;
        A[n] = inside ? c.A[channel * N + part + n] * LOG2E : 0.f;
        h[n] = inside && c.initial ? c.initial[state_at + n] : 0.f;
    }
    const float skip = alive && c.D ? c.D[channel] : 0.f;
    const i64 tiles = ROUND_UP(c.length, TILE);

    float next_x[PER_CHANNEL], next_dt[PER_CHANNEL], next_B[PER_STATE], next_C[PER_STATE];
    auto fetch = [&](const int *from) {
        fetch_channels<X_TYPE, X_BY_TOKEN>(next_x, c, at, c.x, from);
        fetch_channels<DELTA_TYPE, DELTA_BY_TOKEN>(next_dt, c, at, c.delta, from);
        fetch_states<B_TYPE, B_BY_TOKEN>(next_B, c, at, c.B, from);
        if (!c.write_starts) fetch_states<C_TYPE, C_BY_TOKEN>(next_C, c, at, c.C, from);
    };
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0);
    if (threadIdx.x < TILE) rows[1][threadIdx.x] = at.row(c, TILE);
    __syncthreads();
    fetch(rows[0]);
    for (i64 tile = 0; tile < tiles; tile++) {
        const i64 t0 = tile * TILE;
        const int *here = rows[tile % 3];
        activate(next_dt, 0, c, at);
        put_channels<X_BY_TOKEN>(x, next_x, c, at, t0);
        put_channels<DELTA_BY_TOKEN>(dt, next_dt, c, at, t0);
        put_states<B_BY_TOKEN>(B, next_B, c, t0);
        if (!c.write_starts) put_states<C_BY_TOKEN>(C, next_C, c, t0);
        __syncthreads();
        fetch(rows[(tile + 1) % 3]);
        const int ahead = at.row(c, t0 + 2 * TILE);
        if (c.write_starts) {
            float *to = c.starts + ((at.b * c.scans + at.k) * tiles + tile) * c.channels * N + d * N + part;
#pragma unroll
            for (int n = 0; n < STATES; n++)
                if (alive && part + n < N) to[n] = h[n];
        }
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const float u = x[t * PITCH + lane], step = dt[t * PITCH + lane], input = step * u;
            float out = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = exp2_fast(step * A[n]) * h[n] + input * B[t * PADDED + part + n];
                out += h[n] * C[t * PADDED + part + n];
            }
            if (!c.write_starts) {
                out = sum_split(out);
                if (part == 0) y[t * PITCH + lane] = out + skip * u;
            }
        }
        if (threadIdx.x < TILE) rows[(tile + 2) % 3][threadIdx.x] = ahead;
        __syncthreads();
        if (!c.write_starts)
#pragma unroll
            for (int j = 0; j < PER_CHANNEL; j++) {
                const int i = threadIdx.x + j * THREADS;
                const Place p(i, Y_BY_TOKEN);
                if (i < TILE * CHANNELS && t0 + p.t < c.length && at.d0 + p.d < c.channels)
                    store<Y_TYPE>(c.y.data, at.base(c.y) + here[p.t] * c.y.token + (at.d0 + p.d) * c.y.inner,
                                  y[p.t * PITCH + p.d]);
            }
    }
    if (!c.write_starts)
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (alive && part + n < N) c.last[state_at + n] = h[n];
}

// With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}. Tiles from the last to the first; a tile's states are
// recomputed from its start and stay in registers.
extern "C" __global__ void __launch_bounds__(THREADS) scan_backward(const Call c) {
    __shared__ float x[TILE * PITCH], dt[TILE * PITCH], slope[TILE * PITCH], dy[TILE * PITCH];
    __shared__ int rows[3][TILE];
    __shared__ __align__(16) float B[TILE * PADDED], C[TILE * PADDED];
    __shared__ float partial[TILE * WARPS * 2 * PADDED];
    const Block at(c);
    const int lane = threadIdx.x / SPLIT, part = threadIdx.x % SPLIT * STATES, warp = threadIdx.x / 32;
    const i64 d = at.d0 + lane, channel = at.k * c.channels + d;
    const bool alive = d < c.channels;
    const i64 per_batch = at.b * c.scans * c.channels + channel, state_at = per_batch * N + part;
    float A[STATES], g[STATES], dA[STATES], dD = 0.f, dbias = 0.f;
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        bool inside = alive && part + n < N;
        A[n] = inside ? c.A[channel * N + part + n] * LOG2E : 0.f;
        g[n] = inside && c.last ? c.last[state_at + n] : 0.f;
        dA[n] = 0.f;
    }
    const float skip = alive && c.D ? c.D[channel] : 0.f;
    const i64 tiles = ROUND_UP(c.length, TILE);

    float next_x[PER_CHANNEL], next_dt[PER_CHANNEL], next_dy[PER_CHANNEL], next_slope[PER_CHANNEL];
    float next_B[PER_STATE], next_C[PER_STATE], next_h[STATES];
    auto fetch = [&](i64 tile, const int *from) {
        fetch_channels<X_TYPE, X_BY_TOKEN>(next_x, c, at, c.x, from);
        fetch_channels<DELTA_TYPE, DELTA_BY_TOKEN>(next_dt, c, at, c.delta, from);
        fetch_channels<Y_TYPE, Y_BY_TOKEN>(next_dy, c, at, c.y, from);
        fetch_states<B_TYPE, B_BY_TOKEN>(next_B, c, at, c.B, from);
        fetch_states<C_TYPE, C_BY_TOKEN>(next_C, c, at, c.C, from);
        const i64 first = ((at.b * c.scans + at.k) * tiles + max(tile, 0LL)) * c.channels * N;
#pragma unroll
        for (int n = 0; n < STATES; n++)
            next_h[n] = c.starts[first + min(d, c.channels - 1) * N + min(part + n, N - 1)];
    };
    if (threadIdx.x < TILE) rows[(tiles - 1) % 3][threadIdx.x] = at.row(c, (tiles - 1) * TILE);
    if (threadIdx.x < TILE) rows[(tiles + 1) % 3][threadIdx.x] = at.row(c, (tiles - 2) * TILE);
    __syncthreads();
    fetch(tiles - 1, rows[(tiles - 1) % 3]);
    for (i64 tile = tiles - 1; tile >= 0; tile--) {
        const i64 t0 = tile * TILE;
        const int *here = rows[tile % 3];
        activate(next_dt, next_slope, c, at);
        put_channels<X_BY_TOKEN>(x, next_x, c, at, t0);
        put_channels<DELTA_BY_TOKEN>(dt, next_dt, c, at, t0);
        put_channels<DELTA_BY_TOKEN>(slope, next_slope, c, at, t0);
        put_channels<Y_BY_TOKEN>(dy, next_dy, c, at, t0);
        put_states<B_BY_TOKEN>(B, next_B, c, t0);
        put_states<C_BY_TOKEN>(C, next_C, c, t0);
        float before[TILE][STATES];  // state before each step
#pragma unroll
        for (int n = 0; n < STATES; n++) before[0][n] = alive && part + n < N ? next_h[n] : 0.f;
        __syncthreads();
        fetch(tile - 1, rows[(tile + 2) % 3]);
        const int ahead = at.row(c, t0 - 2 * TILE);
#pragma unroll
        for (int t = 0; t + 1 < TILE; t++) {
            const float step = dt[t * PITCH + lane], input = step * x[t * PITCH + lane];
#pragma unroll
            for (int n = 0; n < STATES; n++)
                before[t + 1][n] = exp2_fast(step * A[n]) * before[t][n] + input * B[t * PADDED + part + n];
        }
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--) {
            const float u = x[t * PITCH + lane], step = dt[t * PITCH + lane], out = dy[t * PITCH + lane];
            const float input = step * u;
            float dinput = 0.f, dlog = 0.f, v[2 * STATES];  // v: contributions to dB, then to dC
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const float b = B[t * PADDED + part + n], decayed = exp2_fast(step * A[n]);
                const float gn = g[n] + out * C[t * PADDED + part + n], carried = gn * decayed;
                const float w = carried * before[t][n];
                v[n] = gn * input;
                v[STATES + n] = out * (decayed * before[t][n] + input * b);
                dinput += gn * b;
                dlog += w * A[n];
                dA[n] += w * step;
                g[n] = carried;
            }
            dinput = sum_split(dinput);
            dlog = sum_split(dlog);
            // sum v over the channels of the warp: halve the values a lane holds while there are several
            int held = 2 * STATES, first = 0;
#pragma unroll
            for (int mask = SPLIT; mask < 32; mask <<= 1) {
                if (held > 1) {
                    held /= 2;
                    const bool upper = threadIdx.x & mask;
                    first += upper ? held : 0;
#pragma unroll
                    for (int i = 0; i < held; i++) {
                        const float keep = upper ? v[held + i] : v[i], give = upper ? v[i] : v[held + i];
                        v[i] = keep + __shfl_xor_sync(~0u, give, mask);
                    }
                } else {
                    v[0] += __shfl_xor_sync(~0u, v[0], mask);
                }
            }
#pragma unroll
            for (int i = 0; i < held; i++) {
                const int value = first + i, n = value % STATES, is_C = value / STATES;
                partial[((t * WARPS + warp) * 2 + is_C) * PADDED + part + n] = v[i];
            }
            if (part == 0) {  // x and dt now hold their gradients
                const float ddelta = (dinput * u + dlog * LN2) * slope[t * PITCH + lane];
                dD += out * u;
                dbias += ddelta;
                x[t * PITCH + lane] = dinput * step + skip * out;
                dt[t * PITCH + lane] = ddelta;
            }
            __syncwarp();
        }
        if (threadIdx.x < TILE) rows[(tile + 1) % 3][threadIdx.x] = ahead;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < PER_CHANNEL; j++) {
            const int i = threadIdx.x + j * THREADS;
            const Place p(i, false);
            if (i < TILE * CHANNELS && t0 + p.t < c.length && at.d0 + p.d < c.channels) {
                const i64 token = (at.b * c.length + here[p.t]) * c.scans + at.k;
                const i64 into = token * c.channels + at.d0 + p.d;
                store<DX_TYPE>(c.dx, into, x[p.t * PITCH + p.d]);
                store<DELTA_TYPE>(c.ddelta, into, dt[p.t * PITCH + p.d]);
            }
        }
        for (int i = threadIdx.x; i < TILE * 2 * PADDED; i += THREADS) {
            const int t = i / (2 * PADDED), is_C = i / PADDED % 2, n = i % PADDED;
            if (t0 + t < c.length && n < N) {
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += partial[((t * WARPS + w) * 2 + is_C) * PADDED + n];
                const i64 row = ((i64)blockIdx.x * c.batch + at.b) * c.length + here[t];
                (is_C ? c.dC : c.dB)[(row * c.scans + at.k) * N + n] = sum;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < STATES; n++)
        if (alive && part + n < N) {
            c.dinitial[state_at + n] = g[n];
            c.dA[state_at + n] = dA[n];
        }
    if (alive && part == 0) {
        c.dD[per_batch] = dD;
        c.dbias[per_batch] = dbias;
    }
}
