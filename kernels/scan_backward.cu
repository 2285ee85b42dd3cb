// The selective scan's gradients on NVIDIA GPUs; behind scan_tiles.cuh. Segments: scan.cu.

// dB and dC of GROUP steps, summed over the channels of four neighbouring lanes by tensor cores: a product with a
// matrix of ones and zeros that gives lane q = lane % 4 the totals of step q / PARTS of the group and of part q % PARTS
// of the quad. A product takes four values a lane: dB and dC of two states (or, with one state a lane, of two steps).
struct Totals {
    static constexpr int PARTS = WIDTH < 4 ? 4 / WIDTH : 1, SUBSETS = WIDTH < 4 ? 1 : WIDTH / 4;
    static constexpr int PAIR = STATES == 1 ? 2 : 1, GROUP = 4 / PARTS * PAIR, PRODUCTS = STATES == 1 ? 1 : STATES / 2;
    static constexpr int PER_STEP = 2 * PADDED + 4, PER_SUBSET = TILE * PER_STEP + 16;  // padded against bank conflicts
    static constexpr bool ROUNDED = B_TYPE == 1 && C_TYPE == 1;  // the product's 10 bits are more than the output's
    float c[PRODUCTS][4], a[PRODUCTS][4];
    int quad, q, wanted, to;

    INLINE Totals(const Place &at) : quad(at.lane / 4), q(at.lane % 4) {
        const int part = WIDTH < 4 ? quad * PARTS + q % PARTS : at.part, subset = WIDTH < 4 ? 0 : at.c / 4;
        wanted = quad - (WIDTH < 4 ? q / WIDTH * 2 : 0);
        to = (at.warp * SUBSETS + subset) * PER_SUBSET + q / PARTS * PAIR * PER_STEP + part * STATES;
        clear();
    }
    INLINE void clear() {
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) c[m][0] = c[m][1] = c[m][2] = c[m][3] = 0.f;
    }
    INLINE void put(int t, int n, float dB, float dC) {
        const int i = STATES == 1 ? t % 2 : n % 2;
        a[n / 2][i] = dB, a[n / 2][2 + i] = dC;
    }
    // After the last of a step's states, steps from the last of a group to the first: into `partial`
    INLINE void step(int t, float *partial) {
        if (t % PAIR) return;
        const int s = t % GROUP / PAIR * PARTS * 2;
        const float b0 = wanted == s ? 1.f : 0.f, b1 = wanted == s + 1 ? 1.f : 0.f;
#pragma unroll
        for (int m = 0; m < PRODUCTS; m++) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
            if constexpr (!ROUNDED) {
                float rest[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float high = __uint_as_float(__float_as_uint(a[m][i]) & 0xffffe000);
                    rest[i] = a[m][i] - high, a[m][i] = high;
                }
                mma_16x8x8(c[m], rest, b0, b1);
            }
            mma_16x8x8(c[m], a[m], b0, b1);
#else
#pragma unroll
            for (int from = 0; from < 4; from++) {
                const bool mine = q == s / 2 + (WIDTH < 4 ? from / WIDTH : 0);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float v = __shfl_sync(~0u, a[m][i], from, 4);
                    c[m][i % 2 * 2 + i / 2] += mine ? v : 0.f;
                }
            }
#endif
        }
        if (t % GROUP) return;
        float *p = partial + to + t * PER_STEP;
        if constexpr (STATES == 1) {
            p[0] = c[0][0], p[PADDED] = c[0][1], p[PER_STEP] = c[0][2], p[PER_STEP + PADDED] = c[0][3];
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int m = 0; m < PRODUCTS; m++)
                    *(float2 *)(p + half * PADDED + m * 2) = make_float2(c[m][half], c[m][2 + half]);
            }
        }
        clear();
    }
};

struct alignas(16) BackwardStep {
    static constexpr bool HAS_SLOPE = true;
    float dt, x, dy, slope;
};

template <class X, class DY>
INLINE void publish(BackwardStep *tile, const Delta<true> &delta, const X &x, const DY &dy) {
    if constexpr (X::BY_TOKENS == DELTA_BY_TOKEN && DY::BY_TOKENS == DELTA_BY_TOKEN) {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            BackwardStep step;
            step.dt = delta.dt(j, step.slope), step.x = x.value(j), step.dy = dy.value(j);
            tile[delta.at(j)] = step;
        }
    } else {
        delta.publish(tile);
        x.publish(tile, &BackwardStep::x);
        dy.publish(tile, &BackwardStep::dy);
    }
}

// With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}. Tiles from the last to the first; a tile's states are
// recomputed from its start and stay in registers. One barrier a tile, as in `forward`; dB and dC of the tile before
// are summed behind it.
INLINE void backward(const Call &c) {
    static_assert(EVERY == TILE && TILE % Totals::GROUP == 0, "a tile begins at a kept state and holds whole groups");
    constexpr int SUBSETS = WARPS * Totals::SUBSETS, BUFFERS = WARPS == 1 ? 1 : 2;
    __shared__ int rows[4][TILE];
    __shared__ __align__(16) BackwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float shared_B[2][TILE * PADDED], shared_C[2][TILE * PADDED];
    float *partials = (float *)dynamic_shared();  // (BUFFERS, SUBSETS, PER_SUBSET): dB and dC of a tile
    __shared__ float2 gates[GATED ? WARPS : 1][TILE * PITCH];
    const Place at(c, true);
    Channels<X_TYPE, X_BY_TOKEN> x(c, at, c.x, c.x_view);
    Channels<DY_TYPE, DY_BY_TOKEN> dy(c, at, c.dy, c.dy_view);
    Delta<true> delta(c, at);
    Gate z(c, at);
    States<B_TYPE, B_BY_TOKEN> B(at, c.B, c.B_view);
    States<C_TYPE, C_BY_TOKEN> C(at, c.C, c.C_view);
    const Output<X_TYPE> dx(c, at, c.dx);
    const Output<DELTA_TYPE> ddelta(c, at, c.ddelta);
    const Output<Z_TYPE> dz(c, at, c.dz);
    BackwardStep *tile = steps[at.warp];
    Totals totals(at);
    Start start;
    float A[STATES], g[STATES] = {}, dA[STATES] = {}, dD = 0.f, dbias = 0.f;
    load_decays(A, c, at);
    if (c.segments > 1) load_states(g, c.ends, at.in_segment(c, at.s), at.part, at.alive);
    else if (c.gradient) load_states(g, c.gradient, at.in_scan(c), at.part, at.alive);
    const float skip = c.D ? c.D[at.channel(c)] : 0.f;
    const int states_row = (int)c.scans * N * 4;
    const i64 first_start = (at.b * c.scans + at.k) * ROUND_UP(c.length, TILE) + at.begin / TILE;
    const i64 block = blockIdx.x % ROUND_UP(c.channels, CHANNELS);
    const i64 states_at = ((block * c.batch + at.b) * c.length * c.scans + at.k) * N;  // into dB and dC, of token 0

    auto fetch = [&](int i, const int *from) {
        x.fetch(from), delta.fetch(from), dy.fetch(from), B.fetch(from), C.fetch(from);
        if (GATED) z.fetch(from);
        start.fetch(c.starts, (first_start + max(at.tiles - 1 - i, 0)) * c.channels + at.d(), at.part, at.alive);
    };
    auto sum_partials = [&](int i) {  // of the i-th tile, once all warps have left it
        const float *partial = partials + i % BUFFERS * (SUBSETS * Totals::PER_SUBSET);
        const int count = at.steps(i), *here = rows[i % 4];
        constexpr int RUN = N == PADDED && N % 4 == 0 ? 4 : 1;  // neighbours that a lane sums
#pragma unroll
        for (int j = 0; j < ROUND_UP(TILE * 2 * PADDED, THREADS * RUN); j++) {
            const unsigned v = (threadIdx.x + j * THREADS) * RUN, t = v / (2 * PADDED), is_C = v / PADDED % 2;
            const unsigned n = v % PADDED;
            if (t >= count || n >= N) continue;
            Pack<0, RUN> sum = {};
#pragma unroll
            for (int w = 0; w < SUBSETS; w++) {
                const Pack<0, RUN> part = *(const Pack<0, RUN> *)(partial + w * Totals::PER_SUBSET + v + t * 4);
#pragma unroll
                for (int r = 0; r < RUN; r++)
                    sum.v[r] = __float_as_uint(__uint_as_float(sum.v[r]) + __uint_as_float(part.v[r]));
            }
            *(Pack<0, RUN> *)((char *)((is_C ? c.dC : c.dB) + states_at + n) + offset(here[t], states_row)) = sum;
        }
    };
    int ahead = 0;
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0), ahead = at.row(c, 1);
    __syncthreads();
    fetch(0, rows[0]);
    for (int i = 0; i < at.tiles; i++) {
        const int count = at.steps(i), *here = rows[i % 4];
        __syncwarp();
        publish(tile, delta, x, dy);
        float slopes[OWN];  // of dz, but for y
        if (GATED) {
            z.publish(gates[at.warp]);
            Gate::apply(tile, &BackwardStep::dy, gates[at.warp], at, slopes);
        }
        blank_outside(tile, at, count);
        B.publish(shared_B[i % 2]), C.publish(shared_C[i % 2]);
        const float *B_t = shared_B[i % 2] + at.part * STATES, *C_t = shared_C[i % 2] + at.part * STATES;
        float *partial = partials + i % BUFFERS * (SUBSETS * Totals::PER_SUBSET);
        if (threadIdx.x < TILE) rows[(i + 1) % 4][threadIdx.x] = ahead;
        float h[TILE + 1][STATES], a[KEEP_DECAY ? TILE : 1][STATES];  // h[t]: state before step t
#pragma unroll
        for (int n = 0; n < STATES; n++) h[0][n] = decode<START_TYPE>(start.raw.v[n]);
        __syncthreads();
        fetch(i + 1, rows[(i + 1) % 4]);
        if (threadIdx.x < TILE) ahead = at.row(c, i + 2);
        if (i) sum_partials(i - 1);
        if (BUFFERS == 1) __syncwarp();
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const BackwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const float a_n = exp2_fast(step.dt * A[n]);
                h[t + 1][n] = a_n * h[t][n] + input * B_t[t * PADDED + n];
                if (KEEP_DECAY) a[t][n] = a_n;
            }
        }
        float dinput[SPLIT], dlog[SPLIT], y[SPLIT];
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--) {
            const BackwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
            dinput[t % SPLIT] = dlog[t % SPLIT] = y[t % SPLIT] = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const float a_n = KEEP_DECAY ? a[t][n] : exp2_fast(step.dt * A[n]);
                const float g_n = g[n] + step.dy * C_t[t * PADDED + n];
                g[n] = g_n * a_n;
                const float w = g[n] * h[t][n];
                totals.put(t, n, g_n * input, step.dy * h[t + 1][n]);
                dinput[t % SPLIT] += g_n * B_t[t * PADDED + n];
                dlog[t % SPLIT] += w * A[n];
                if (GATED) y[t % SPLIT] += h[t + 1][n] * C_t[t * PADDED + n];
                dA[n] += w * step.dt;
            }
            totals.step(t, partial);
            if (t % SPLIT == 0) {
                const int own = t + at.part;
                const BackwardStep mine = tile[own * PITCH + at.c];
                sum_parts<SPLIT / 2>(dinput, at);
                sum_parts<SPLIT / 2>(dlog, at);
                if (GATED) sum_parts<SPLIT / 2>(y, at);
                const float grad = (dinput[0] * mine.x + dlog[0] * LN2) * mine.slope;
                dD += mine.dy * mine.x, dbias += grad;
                if (at.alive && own < count) {
                    dx.store(here[own], dinput[0] * mine.dt + skip * mine.dy);
                    ddelta.store(here[own], grad);
                    if (GATED) dz.store(here[own], slopes[t / SPLIT] * (y[0] + skip * mine.x));
                }
            }
        }
    }
    __syncthreads();
    sum_partials(at.tiles - 1);
    const i64 piece = ((at.b * c.segments + at.s) * c.scans + at.k) * c.channels + at.d();
    store_states(dA, c.dA, piece, at.part, at.alive);
    if (c.last && at.s == 0) store_states(g, c.last, at.in_scan(c), at.part, at.alive);
#pragma unroll
    for (int mask = WIDTH; mask < 32; mask *= 2) {
        dD += __shfl_xor_sync(~0u, dD, mask);
        dbias += __shfl_xor_sync(~0u, dbias, mask);
    }
    if (at.alive && at.part == 0) c.dD[piece] = dD, c.dbias[piece] = dbias;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }
