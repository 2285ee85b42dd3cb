from scan_bench import *
T0 = time.time()
def p(*a): print(*a, flush=True)
def P_(states, split, each, tile, threads, L, segs=1, res=None, **k):
    seg = -(-L // (segs * tile)) * tile
    return P(states, split, tile, threads, seg, resident=res or max(1, 512 // threads), each=each, **k)
V = {
 "VMamba-T": [None, M(512,8,1), M(448,8,1), M(320,16,1), M(256,16,1), M(384,16,1), M(384,8,1)],
 "stage2": [None, M(224,8,2), M(256,16,1), M(128,16,3), M(128,8,4)],
 "stage3": [None, M(224,8,2), M(128,16,3), M(64,16,6), M(128,8,4)],
 "stage4": [None, M(64,8,8), M(32,16,12), M(32,8,16)],
}
VB = {"VMamba-T": [None, M(256,8,1), M(384,8,1), M(224,8,1)],
 "stage2": [None, M(256,8,1), M(128,8,2), M(96,8,2)],
 "stage3": [None, M(128,8,2), M(64,8,4)],
 "stage4": [None, M(64,8,4), M(32,8,8)]}
N16 = {}
for n, L, segs in (("DiM1024", 4096, (1, 1, 1)), ("DiM256", 256, (1, 1, 1)), ("P3", 6400, (1, 2, 1)), ("P2", 25600, (2, 4, 2)), ("Serpent", 262144, (22, 88, 44)), ("next", 65536, (11, 44, 22))):
    base = P_(16,1,1,8,128,L) if n == "DiM256" else P_(4,4,1,16,128,L,segs[0]) if n in ("Serpent", "next") else P_(8,2,1,16,128,L,segs[0])
    N16[n] = [base] + [P_(8,2,2,8,t,L,segs[1],r) for t, r in ((128,4),(128,3),(64,8))] + [P_(8,2,2,16,128,L,segs[1],3), P_(4,4,2,16,128,L,segs[2],4), P_(4,4,2,16,128,L,segs[2],3), P_(4,4,2,8,128,L,segs[2],4), P_(4,4,2,16,64,L,segs[2],8), P_(4,4,4,8,128,L,segs[1],4), P_(4,4,4,8,128,L,segs[1],3)]
N16["DiM1024"] += [P_(8,2,2,8,96,4096,1,5), P_(8,2,2,8,128,4096,2,4), P_(4,4,2,16,96,4096,1,5), P_(4,4,2,16,128,4096,2,4)]
N16["P3"] += [P_(8,2,2,8,128,6400,1,4), P_(8,2,2,8,128,6400,3,4), P_(4,4,2,16,128,6400,2,4)]
N16["P2"] += [P_(8,2,2,8,128,25600,8,4), P_(8,2,2,8,128,25600,2,4), P_(4,4,2,16,128,25600,1,4), P_(4,4,2,16,128,25600,3,4)]
P5 = [None] + [P(2,8,16,128,400,resident=r,scans=4) for r in (4,1)] + [P(2,8,32,128,416,resident=1,scans=4), P(1,16,16,256,400,resident=1,scans=4), P(1,16,32,256,416,resident=1,scans=4), P(4,4,16,128,400,resident=1,scans=4), P(4,4,32,128,416,resident=1,scans=4), P(2,8,8,128,400,resident=1,scans=4)]
def one(inp, v, starts=None):
    tl.plan, tl.merged = (v, None) if isinstance(v, P) else (None, v or None)
    return cuda.scan(*inp, True, True, starts=starts)
def back(inp, dy, st, v):
    tl.plan, tl.merged, tl.merged_back = None, None, v
    return cuda.scan_backward(dy, None, *inp, True, True, starts=st)
team = cuda.team_plan
cuda.team_plan = lambda *a: None
small = {}
for n in [*V, *N16, "P5"]:
    s = SHAPES[n]; SHAPES[n] = (1, *s[1:]); small[n] = make(n); SHAPES[n] = s
def warm(job):
    n, v, kind = job
    try:
        i1 = small[n]
        if kind == 0: one(i1, v)
        else:
            k = cuda.kept_states(*i1[:3]); st = torch.zeros(k[0], dtype=k[1], device="cuda")
            if kind == 1: back(i1, torch.zeros_like(i1[0][:, :, 0]), st, v)
            else: one(i1, v, st)
    except Exception as e: p("compile", n, v, repr(e)[:200])
jobs = [(n, v, 0) for d in (V, N16) for n, vs in d.items() for v in vs] + [("P5", v, 0) for v in P5] + [(n, v, k) for n, vs in VB.items() for v in vs for k in (1,)] + [(n, v, 2) for n, vs in V.items() for v in vs]
with ThreadPoolExecutor(16) as ex: list(ex.map(warm, jobs))
torch.cuda.synchronize(); del small; tl.__dict__.clear(); p("compiled", round(time.time() - T0, 1))
for n in V:
    try:
        inp = make(n)
        k = cuda.kept_states(*inp[:3]); st = torch.empty(k[0], dtype=k[1], device="cuda")
        base, bl = one(inp, None)
        for v in V[n]:
            y, last = one(inp, v, st); y2, _ = one(inp, v)
            p(n, v and tuple(v), f"{times(lambda: one(inp, v)):.3f} kept {times(lambda: one(inp, v, st), 9):.3f} vs old {err(y, base):.1e}", torch.equal(y, y2))
        dy = torch.randn_like(base)
        gb = back(inp, dy, st, None)
        for v in VB[n]:
            g = back(inp, dy, st, v)
            p("back", n, v and tuple(v), f"{times(lambda: back(inp, dy, st, v), 9):.3f}", f"{max(err(a, b) for a, b in zip(g[:7], gb)):.1e}")
        del inp, st, g, gb, dy, base, y, y2
    except Exception: traceback.print_exc()
for n in N16:
    try:
        inp = make(n); base = None
        for v in N16[n]:
            y, last = one(inp, v); base = y if base is None else base
            p(n, tuple(v)[:5], "res", v.resident, "each", v.each, f"{times(lambda: one(inp, v), 9):.3f}", f"err {err(y[:1], base[:1]):.1e}")
        del inp, base, y
    except Exception: traceback.print_exc()
def graphed(f):
    f(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    return times(g.replay, 40)
try:
    inp = make("P5"); base = None
    for v in P5:
        y, last = one(inp, v); base = y if base is None else base
        p("P5", v and tuple(v), f"graph {graphed(lambda: one(inp, v))*1e3:.1f} us", f"err {err(y, base):.1e}")
except Exception: traceback.print_exc()
tl.__dict__.clear(); base = y = last = None
cuda._layout = layout_cached; cuda.team_plan = team
cuda._layout.cache_clear()
def host(name, f):
    f(); torch.cuda.synchronize(); hs = []
    for _ in range(8):
        t0 = time.perf_counter(); [f() for _ in range(100)]; hs.append((time.perf_counter() - t0) / 100); torch.cuda.synchronize()
    p(f"{name}: events {times(f, 200)*1e3:.1f} us, host {min(hs)*1e6:.1f}, graph {graphed(f)*1e3:.1f}")
try:
    inp = make("P5"); x = inp[0]
    host("P5 scan", lambda: cuda.scan(*inp, True, True))
    host("P5 scan, no state", lambda: cuda.scan(*inp, True, True, want_state=False))
    from mambavision.ops import multi_scan
    tab = order_table("cross", (20, 20), x.device)
    with torch.no_grad(): host("P5 multi_scan", lambda: multi_scan(x[:, :, 0], *inp[1:6], orders=tab, grid=(20, 20), delta_bias=inp[6]))
    q = lambda: x.new_empty((1, 400, 512))
    t0 = time.perf_counter(); [q() for _ in range(2000)]; p(f"new_empty {(time.perf_counter()-t0)/2e-3:.2f} us")
    from mambavision.kernels import nvrtc
    import cProfile, pstats
    f = lambda: cuda.scan(*inp, True, True, want_state=False)
    lay = cuda._layout
    k0 = []
    ol = nvrtc.launch
    nvrtc.launch = lambda *a: k0.append(a)
    f(); nvrtc.launch = ol
    t0 = time.perf_counter(); [ol(*k0[0]) for _ in range(500)]; p(f"launch {(time.perf_counter()-t0)/5e-4:.2f} us"); torch.cuda.synchronize()
    nvrtc.launch = lambda *a: None
    t0 = time.perf_counter(); [f() for _ in range(2000)]; p(f"scan without launch {(time.perf_counter()-t0)/2e-3:.2f} us"); nvrtc.launch = ol
    torch.cuda.synchronize()
except Exception: traceback.print_exc()
p("seconds", round(time.time() - T0, 1))
