// A scan's tiles, as scan.cu and scan_backward.cu walk them: who works on what, loads and stores. Behind scan.cuh.
//
// A channel's states are spread over SPLIT lanes of STATES each, so a warp walks WIDTH = 32 / SPLIT channels of one scan
// through time, TILE steps at once. Of a tile, a lane loads, activates and stores only OWN = TILE / SPLIT steps of its
// channel; shared memory hands them to the lanes that need them.

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
