// The selective scan on NVIDIA GPUs: forward and backward, any scan order and strides.
//
// Compiled by cuda_layout.py through NVRTC, behind intrinsics.cuh, one ENTRY at a time. A channel's states are spread over
// SPLIT lanes of STATES each, so a warp walks WIDTH = 32 / SPLIT channels of one scan through time, TILE steps at once.
// Of a tile, a lane loads, activates and stores only OWN = TILE / SPLIT steps of its channel; shared memory hands them
// to the lanes that need them. Loads of the next tile are in flight while the present one is worked on. Long sequences
// are cut into segments that run side by side: `reach` sums what each passes on, `carry` chains them, then all start
// right. Macros: scan.cuh.

constexpr int TEAM = THREADS / SCANS, WIDTH = 32 / SPLIT, CHANNELS = TEAM / SPLIT, PADDED = STATES * SPLIT;
constexpr int OWN = TILE / SPLIT, PER_STATE = ROUND_UP(TILE * PADDED, TEAM);
constexpr int PITCH = WIDTH + 1;  // of a warp's tile in shared memory: both ways of filling it miss bank conflicts

// What a block and a lane work on: a channel of one scan in one segment of time, walked forwards or backwards.
struct Place {
    i64 b, k, s, d0, begin, end;  // d0: the warp's first channel
    int thread, team;             // within its team; SCANS teams a block, one for each scan, or one team
    int warp, lane, c, part, channels, tiles;  // c: channel within the warp, which has so many
    bool backwards, alive;
    const int *order;

    INLINE Place(const Call &call, bool backwards) : backwards(backwards) {
        const i64 blocks = ROUND_UP(call.channels, CHANNELS);
        thread = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % WIDTH, part = lane / WIDTH;
        i64 i = blockIdx.x;
        d0 = i % blocks * CHANNELS + thread / 32 * WIDTH, i /= blocks;
        if (SCANS == 1) k = i % call.scans, i /= call.scans;
        else k = team;
        s = i % call.segments, b = i / call.segments;
        begin = s * call.segment, end = min(begin + call.segment, call.length), tiles = ROUND_UP(end - begin, TILE);
        channels = (int)min(max(call.channels - d0, 0LL), (i64)WIDTH), alive = c < channels;
        order = call.order ? call.order + k * call.length : 0;
    }
    INLINE i64 d() const { return d0 + c; }
    INLINE i64 t0(int i) const { return begin + (i64)(backwards ? tiles - 1 - i : i) * TILE; }
    INLINE int steps(int i) const { return (int)min(end - t0(i), (i64)TILE); }  // of the i-th tile
    // token visited at step `thread` of the i-th tile, for the threads that stage the rows of tiles
    INLINE int row(const Call &call, int i) const {
        const i64 t = min(max(t0(i) + thread, 0LL), call.length - 1);
        return order ? order[t] : (int)t;
    }
    INLINE i64 channel(const Call &call) const { return k * call.channels + min(d(), call.channels - 1); }
    INLINE i64 in_scan(const Call &call) const { return (b * call.scans + k) * call.channels + d(); }
    INLINE i64 in_segment(const Call &call, i64 segment) const {  // index into (batch, scans, segments, channels)
        return ((b * call.scans + k) * call.segments + segment) * call.channels + d();
    }
};

// A warp's (TILE, WIDTH) tile of x, delta or dy. Element j of a lane is step t(j) of channel c(j): with channels as
// neighbours in memory a lane keeps to its own channel and takes steps j * SPLIT + part; else it keeps to one step.
// Loads are unconditional, so that all are in flight together, and stay undecoded until they are wanted.
template <int TYPE, bool BY_TOKEN, bool CHANGES = false> struct Channels {
    static constexpr bool BY_TOKENS = BY_TOKEN;
    const char *from;
    int token, inner, lane, channels;
    unsigned raw[OWN];

    INLINE Channels(const Call &call, const Place &at, const char *data, const View &a)
        : token(a.token), inner(a.inner), lane(at.lane), channels(at.channels) {
        from = data + at.b * a.batch + at.k * a.scan + min(at.d0, call.channels - 1) * inner;
        from = whole(BY_TOKEN ? from : from + (i64)allowed(0) * inner);
    }
    INLINE int t(int j) const { return BY_TOKEN ? lane % TILE : j * SPLIT + lane / WIDTH; }
    INLINE int c(int j) const { return BY_TOKEN ? j * (32 / TILE) + lane / TILE : lane % WIDTH; }
    INLINE int allowed(int j) const { return min(c(j), max(channels - 1, 0)); }
    INLINE float value(int j) const { return decode<TYPE>(raw[j]); }
    INLINE void fetch(const int *rows) {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const char *p = from + offset(rows[t(j)], token) + (BY_TOKEN ? offset(allowed(j), inner) : 0);
            raw[j] = CHANGES ? load_before<TYPE>(p) : load<TYPE>(p);
        }
    }
    INLINE int at(int j) const { return t(j) * PITCH + c(j); }
    template <class STEP> INLINE void publish(STEP *tile, float STEP::*field) const {
#pragma unroll
        for (int j = 0; j < OWN; j++) tile[at(j)].*field = value(j);
    }
};

// delta, with its bias and softplus; CHANGES: its gradient may be written over it
template <bool CHANGES> struct Delta : Channels<DELTA_TYPE, DELTA_BY_TOKEN, CHANGES> {
    typedef Channels<DELTA_TYPE, DELTA_BY_TOKEN, CHANGES> Base;
    using Base::at;
    float bias[DELTA_BY_TOKEN ? OWN : 1];  // of the channel of element j

    INLINE Delta(const Call &call, const Place &at) : Base(call, at, call.delta, call.delta_view) {
        const i64 first = at.k * call.channels + min(at.d0, call.channels - 1);
#pragma unroll
        for (int j = 0; j < (DELTA_BY_TOKEN ? OWN : 1); j++) bias[j] = call.bias ? call.bias[first + this->allowed(j)] : 0.f;
    }
    INLINE float dt(int j, float &slope) const {
        const float v = this->value(j) + bias[DELTA_BY_TOKEN ? j : 0];
        slope = 1.f;
        return SOFTPLUS ? softplus(v, slope) : v;
    }
    template <class STEP> INLINE void publish(STEP *tile) const {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            float slope;
            tile[at(j)].dt = dt(j, slope);
            if constexpr (STEP::HAS_SLOPE) tile[at(j)].slope = slope;
        }
    }
};

// silu(z) and its slope, of a tile
struct Gate : Channels<Z_TYPE, Z_BY_TOKEN> {
    INLINE Gate(const Call &call, const Place &at) : Channels(call, at, call.z, call.z_view) {}
    INLINE void publish(float2 *tile) const {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const float v = value(j), s = sigmoid(v);
            tile[t(j) * PITCH + c(j)] = make_float2(v * s, s * (1.f + v * (1.f - s)));
        }
    }
    // Multiplies a field of a lane's own steps, and keeps what the slope makes of it
    template <class STEP> static INLINE void apply(STEP *tile, float STEP::*field, const float2 *gates, const Place &at,
                                                   float *slopes) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const int i = (j * SPLIT + at.part) * PITCH + at.c;
            slopes[j] = tile[i].*field * gates[i].y;
            tile[i].*field *= gates[i].x;
        }
    }
};

// Steps past the end and channels past the last become zeros: decay 1 and no input
template <class STEP> INLINE void blank_outside(STEP *tile, const Place &at, int steps) {
    if (steps == TILE && at.channels == WIDTH) return;
    __syncwarp();
    for (int t = at.part; t < TILE; t += SPLIT)
        if (t >= steps || !at.alive) tile[t * PITCH + at.c] = STEP();
}

// A tile of B or C, shared by the team
template <int TYPE, bool BY_TOKEN> struct States {
    const char *from;
    int token, inner, thread;
    unsigned raw[PER_STATE];

    INLINE States(const Place &at, const char *data, const View &a)
        : from(whole(data + at.b * a.batch + at.k * a.scan)), token(a.token), inner(a.inner), thread(at.thread) {}
    INLINE int t(int i) const { return BY_TOKEN ? i % TILE : i / PADDED; }
    INLINE int n(int i) const { return BY_TOKEN ? i / TILE : i % PADDED; }
    INLINE void fetch(const int *rows) {
#pragma unroll
        for (int j = 0; j < PER_STATE; j++) {
            int i = thread + j * TEAM;
            if (TILE * PADDED % TEAM) i = min(i, TILE * PADDED - 1);
            raw[j] = load<TYPE>(from + offset(rows[t(i)], token) + offset(min(n(i), N - 1), inner));
        }
    }
    INLINE void publish(float *tile) const {
#pragma unroll
        for (int j = 0; j < PER_STATE; j++) {
            const int i = thread + j * TEAM;
            if (TILE * PADDED % TEAM == 0 || i < TILE * PADDED)
                tile[t(i) * PADDED + n(i)] = n(i) < N ? decode<TYPE>(raw[j]) : 0.f;
        }
    }
};

// A lane's states of its channel, from or to an array (..., channels, N); `at` indexes (..., channels)
INLINE void load_states(float *h, const float *from, i64 at, int part, bool alive) {
    const float *p = from + at * N + part * STATES;
    if constexpr (N == PADDED && STATES % 4 == 0) {
#pragma unroll
        for (int n = 0; n < STATES; n += 4) {
            const float4 v = alive ? *(const float4 *)(p + n) : make_float4(0.f, 0.f, 0.f, 0.f);
            h[n] = v.x, h[n + 1] = v.y, h[n + 2] = v.z, h[n + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++) h[n] = alive && part * STATES + n < N ? p[n] : 0.f;
    }
}

INLINE void store_states(const float *h, float *to, i64 at, int part, bool alive) {
    float *p = to + at * N + part * STATES;
    if constexpr (N == PADDED && STATES % 4 == 0) {
#pragma unroll
        for (int n = 0; n < STATES; n += 4)
            if (alive) *(float4 *)(p + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (alive && part * STATES + n < N) p[n] = h[n];
    }
}

// A lane's kept states of its channel, loaded undecoded; `at` as above
struct Start {
    static constexpr bool PACKED = N == PADDED;
    typedef typename Element<START_TYPE>::bits bits;
    Pack<START_TYPE, STATES> raw;

    INLINE void fetch(const char *from, i64 at, int part, bool alive) {
        const bits *p = (const bits *)from + at * N + part * STATES;
        if (PACKED && alive) raw = *(const Pack<START_TYPE, STATES> *)p;
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (!PACKED || !alive) raw.v[n] = alive && part * STATES + n < N ? p[n] : 0;
    }
    static INLINE void store(const float *h, char *to, i64 at, int part, bool alive) {
        bits *p = (bits *)to + at * N + part * STATES;
        Pack<START_TYPE, STATES> pack;
#pragma unroll
        for (int n = 0; n < STATES; n++) pack.v[n] = encode<START_TYPE>(h[n]);
        if (PACKED && alive) *(Pack<START_TYPE, STATES> *)p = pack;
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (!PACKED && alive && part * STATES + n < N) p[n] = pack.v[n];
    }
};

INLINE void load_decays(float *A, const Call &call, const Place &at) {
    load_states(A, call.A, at.channel(call), at.part, true);
#pragma unroll
    for (int n = 0; n < STATES; n++) A[n] *= LOG2E;
}

// A lane's place in (batch, length, scans, channels): address of token 0, and bytes to the next token
template <int TYPE> struct Output {
    char *to;
    int token;

    INLINE Output(const Call &call, const Place &at, char *data) : token(call.row * (int)sizeof(bits)) {
        to = whole(data + ((at.b * call.length * call.scans + at.k) * call.channels + at.d()) * sizeof(bits));
    }
    INLINE void store(int row, float v) const { __stwb((bits *)(to + offset(row, token)), encode<TYPE>(v)); }
    typedef typename Element<TYPE>::bits bits;
};

// A level of a sum over lanes: of 2 * HALF values each lane of a pair keeps one half, and the other lane adds its own
template <int HALF> INLINE void exchange(float *v, bool upper, int mask) {
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float keep = upper ? v[HALF + i] : v[i], give = upper ? v[i] : v[HALF + i];
        v[i] = keep + __shfl_xor_sync(~0u, give, mask);
    }
}

// Sums v over the lanes of a channel: lane `part` gets the total of v[part] in v[0]
template <int HALF> INLINE void sum_parts(float *v, const Place &at) {
    if constexpr (HALF > 0) {
        exchange<HALF>(v, at.part & HALF, HALF * WIDTH);
        sum_parts<HALF / 2>(v, at);
    }
}

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

struct alignas(8) ForwardStep {
    static constexpr bool HAS_SLOPE = false;
    float dt, x;
};

// x and delta; a lane that holds both of a step stores them together
template <class X> INLINE void publish(ForwardStep *tile, const Delta<false> &delta, const X &x) {
    if constexpr (X::BY_TOKENS == DELTA_BY_TOKEN) {
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            ForwardStep step;
            float slope;
            step.dt = delta.dt(j, slope), step.x = x.value(j);
            tile[delta.at(j)] = step;
        }
    } else {
        delta.publish(tile);
        x.publish(tile, &ForwardStep::x);
    }
}

// One barrier a tile: what is shared by the team has a second buffer, rows are staged two tiles ahead in a ring of 4.
// With a team for each scan their outputs meet in dynamic shared memory, (SCANS, length, CHANNELS).
template <bool ONLY_STARTS> INLINE void forward(const Call &c) {
    __shared__ int shared_rows[SCANS][4][TILE];
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float shared_B[SCANS][2][TILE * PADDED];
    __shared__ __align__(16) float shared_C[SCANS][2][TILE * PADDED];
    __shared__ float2 gates[GATED ? WARPS : 1][TILE * PITCH];
    const Place at(c, false);
    int(*rows)[TILE] = shared_rows[at.team];
    Channels<X_TYPE, X_BY_TOKEN> x(c, at, c.x, c.x_view);
    Delta<false> delta(c, at);
    Gate z(c, at);
    States<B_TYPE, B_BY_TOKEN> B(at, c.B, c.B_view);
    States<C_TYPE, C_BY_TOKEN> C(at, c.C, c.C_view);
    const Output<X_TYPE> out(c, at, c.y);
    float *all_parts = (float *)dynamic_shared(), *parts = all_parts + at.team * (int)c.length * CHANNELS;
    parts += at.thread / 32 * WIDTH + at.c;
    ForwardStep *tile = steps[at.warp];
    float A[STATES], h[STATES] = {};
    load_decays(A, c, at);
    if (c.segments > 1) load_states(h, c.ends, at.in_segment(c, at.s), at.part, at.alive);
    else if (c.initial) load_states(h, c.initial, at.in_scan(c), at.part, at.alive);
    const float skip = c.D ? c.D[at.channel(c)] : 0.f;
    constexpr int PERIOD = EVERY ? EVERY : 1;
    const i64 first_start = (at.b * c.scans + at.k) * ROUND_UP(c.length, PERIOD);

    auto fetch = [&](const int *from) {
        x.fetch(from), delta.fetch(from), B.fetch(from);
        if (!ONLY_STARTS) C.fetch(from);
        if (GATED && !ONLY_STARTS) z.fetch(from);
    };
    int ahead = 0;
    if (at.thread < TILE) rows[0][at.thread] = at.row(c, 0), ahead = at.row(c, 1);
    __syncthreads();
    fetch(rows[0]);
    for (int i = 0; i < at.tiles; i++) {
        const int count = at.steps(i), *here = rows[i % 4];
        const float *B_t = shared_B[at.team][i % 2] + at.part * STATES;
        const float *C_t = shared_C[at.team][i % 2] + at.part * STATES;
        __syncwarp();
        publish(tile, delta, x);
        if (GATED && !ONLY_STARTS) z.publish(gates[at.warp]);
        blank_outside(tile, at, count);
        B.publish(shared_B[at.team][i % 2]);
        if (!ONLY_STARTS) C.publish(shared_C[at.team][i % 2]);
        if (at.thread < TILE) rows[(i + 1) % 4][at.thread] = ahead;
        __syncthreads();
        fetch(rows[(i + 1) % 4]);
        if (at.thread < TILE) ahead = at.row(c, i + 2);
        const i64 t0 = at.t0(i);
        float y[SPLIT];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            if (EVERY && t % PERIOD == 0 && (PERIOD <= TILE || t0 % PERIOD == 0))
                Start::store(h, c.starts, (first_start + (t0 + t) / PERIOD) * c.channels + at.d(), at.part,
                             at.alive && t < count);
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
            y[t % SPLIT] = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = exp2_fast(step.dt * A[n]) * h[n] + input * B_t[t * PADDED + n];
                if (!ONLY_STARTS) y[t % SPLIT] += h[n] * C_t[t * PADDED + n];
            }
            if (!ONLY_STARTS && t % SPLIT == SPLIT - 1) {
                const int own = t - (SPLIT - 1) + at.part;
                sum_parts<SPLIT / 2>(y, at);
                float v = y[0] + skip * tile[own * PITCH + at.c].x;
                if (GATED) v *= gates[at.warp][own * PITCH + at.c].x;
                if (at.alive && own < count) {
                    if (SCANS == 1) out.store(here[own], v);
                    else parts[here[own] * CHANNELS] = v;
                }
            }
        }
    }
    if (!ONLY_STARTS && c.last && at.s == c.segments - 1) store_states(h, c.last, at.in_scan(c), at.part, at.alive);
    if constexpr (SCANS > 1 && !ONLY_STARTS) {
        __syncthreads();
        const int count = (int)c.length * CHANNELS;
        const i64 d0 = blockIdx.x % ROUND_UP(c.channels, CHANNELS) * CHANNELS;
        for (int i = threadIdx.x; i < count; i += THREADS) {
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < SCANS; k++) sum += all_parts[k * count + i];
            const i64 d = d0 + i % CHANNELS;
            typedef typename Element<X_TYPE>::bits bits;
            if (d < c.channels)
                ((bits *)c.y)[(at.b * c.length + i / CHANNELS) * c.channels + d] = encode<X_TYPE>(sum);
        }
    }
}

// What a segment alone passes on to the next: its last state from a zero start, sum_t exp(A sum_{i>t} dt_i) dt_t x_t
// B_t; ADJOINT, with dy for x and C for B: to the one before, sum_t exp(A sum_{i<=t} dt_i) dy_t C_t. Walked away from
// the receiving end, so that it can stop where every weight has underflowed to 0.
template <bool ADJOINT> INLINE void reach(const Call &c) {
    __shared__ int rows[4][TILE];
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float shared_B[2][TILE * PADDED];
    constexpr bool GATES = GATED && ADJOINT;
    __shared__ float2 gates[GATES ? WARPS : 1][TILE * PITCH];
    const Place at(c, !ADJOINT);
    const i64 receiver = ADJOINT ? at.s - 1 : at.s + 1;
    if (receiver < 0 || receiver == c.segments) return;
    Channels<ADJOINT ? DY_TYPE : X_TYPE, ADJOINT ? DY_BY_TOKEN : X_BY_TOKEN> x(
        c, at, ADJOINT ? c.dy : c.x, ADJOINT ? c.dy_view : c.x_view);
    Delta<false> delta(c, at);
    Gate z(c, at);
    States<ADJOINT ? C_TYPE : B_TYPE, ADJOINT ? C_BY_TOKEN : B_BY_TOKEN> B(
        at, ADJOINT ? c.C : c.B, ADJOINT ? c.C_view : c.B_view);
    ForwardStep *tile = steps[at.warp];
    float A[STATES], ends[STATES] = {}, sum = 0.f, slowest = -__int_as_float(0x7f800000);
    load_decays(A, c, at);
#pragma unroll
    for (int n = 0; n < STATES; n++)
        if (at.part * STATES + n < N) slowest = fmaxf(slowest, A[n]);

    int ahead = 0;
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0), ahead = at.row(c, 1);
    __syncthreads();
    x.fetch(rows[0]), delta.fetch(rows[0]), B.fetch(rows[0]);
    if (GATES) z.fetch(rows[0]);
    for (int i = 0; i < at.tiles; i++) {
        const int *next = rows[(i + 1) % 4];
        const float *B_t = shared_B[i % 2] + at.part * STATES;
        __syncwarp();
        publish(tile, delta, x);
        if (GATES) {
            float slopes[OWN];
            z.publish(gates[at.warp]);
            Gate::apply(tile, &ForwardStep::x, gates[at.warp], at, slopes);
        }
        blank_outside(tile, at, at.steps(i));
        B.publish(shared_B[i % 2]);
        if (threadIdx.x < TILE) rows[(i + 1) % 4][threadIdx.x] = ahead;
        const bool passed = SOFTPLUS && slowest * sum < -127.f;  // without softplus later steps may be negative
        if (__syncthreads_and(passed || !at.alive)) break;
        x.fetch(next), delta.fetch(next), B.fetch(next);
        if (GATES) z.fetch(next);
        if (threadIdx.x < TILE) ahead = at.row(c, i + 2);
        float within = 0.f;
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const int t = ADJOINT ? j : TILE - 1 - j;
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = ADJOINT ? step.x : step.dt * step.x;
            if (ADJOINT) within += step.dt;
#pragma unroll
            for (int n = 0; n < STATES; n++)
                ends[n] += exp2_fast((sum + within) * A[n]) * (input * B_t[t * PADDED + n]);
            if (!ADJOINT) within += step.dt;
        }
        sum += within;
    }
    store_states(ends, c.ends, at.in_segment(c, receiver), at.part, at.alive);
    if (at.alive && at.part == 0) c.sums[at.in_segment(c, receiver)] = sum;
}

// ends[s] becomes the state before segment s (ADJOINT: the gradient after it); one thread a state
template <bool ADJOINT> INLINE void carry(const Call &c) {
    const i64 row = c.channels * N, i = (i64)blockIdx.x * THREADS + threadIdx.x, scan = i / row, at = i % row;
    if (scan >= c.batch * c.scans) return;
    const float A = c.A[scan % c.scans * row + at] * LOG2E;
    const float *outside = ADJOINT ? c.gradient : c.initial;
    float h = outside ? outside[i] : 0.f;
    constexpr int AHEAD = 8;
    for (i64 s0 = 0; s0 < c.segments; s0 += AHEAD) {
        float end[AHEAD], sum[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = min(s0 + j, c.segments - 1), from = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            end[j] = s ? c.ends[from * row + at] : 0.f;
            sum[j] = s ? c.sums[from * c.channels + at / N] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = s0 + j, to = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            h = exp2_fast(A * sum[j]) * h + end[j];
            if (s < c.segments) c.ends[to * row + at] = h;
        }
    }
}

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
template <int PERIOD = EVERY> INLINE void backward(const Call &c) {
    static_assert(PERIOD == TILE && TILE % Totals::GROUP == 0, "a tile begins at a kept state and holds whole groups");
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

// In float32 and in order
template <int IN, int OUT> INLINE void sum(const Job &job, const void *from, void *to_all, i64 block) {
    constexpr int EACH = IN == 0 ? VECTOR : WIDE;
    const i64 i = block * THREADS + threadIdx.x, inner = job.inner / EACH, count = job.outer * inner;
    if (i >= count) return;
    const i64 o = count < 1LL << 32 ? (unsigned)i / (unsigned)inner : i / inner;  // of 64 bits it takes 100 instructions
    const Pack<IN, EACH> *in = (const Pack<IN, EACH> *)from + o * (job.terms - 1) * inner + i;
    float total[EACH] = {};
#pragma unroll 8
    for (i64 j = 0; j < job.terms; j++) {
        const Pack<IN, EACH> term = in[j * inner];
#pragma unroll
        for (int v = 0; v < EACH; v++) total[v] += decode<IN>(term.v[v]);
    }
    Pack<OUT, EACH> out;
#pragma unroll
    for (int v = 0; v < EACH; v++) out.v[v] = encode<OUT>(total[v]);
    i64 to = i * EACH;
    if (job.row) {
        const i64 row = to < 1LL << 32 ? (unsigned)to / (unsigned)job.row : to / job.row;
        to += row * (job.pitch - job.row);
    }
    *(Pack<OUT, EACH> *)((typename Element<OUT>::bits *)to_all + to) = out;
}

// Several sums, one after the other in the grid
INLINE void sums(const Sum &s) {
    i64 block = blockIdx.x;
    int j = 0;
    while (block >= s.job[j].blocks) block -= s.job[j++].blocks;
    const Job &job = s.job[j];
    if (job.in_type == job.out_type) {
        if (job.in_type == 0) sum<0, 0>(job, s.in[j], s.out[j], block);
        if (job.in_type == 1) sum<1, 1>(job, s.in[j], s.out[j], block);
        if (job.in_type == 2) sum<2, 2>(job, s.in[j], s.out[j], block);
    } else {
        if (job.out_type == 1) sum<0, 1>(job, s.in[j], s.out[j], block);
        if (job.out_type == 2) sum<0, 2>(job, s.in[j], s.out[j], block);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }
