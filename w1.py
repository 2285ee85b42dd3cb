from scan_bench import *
import os
def p(*a): print(*a, flush=True)
def P_(states, split, threads, L, segs=1, tile=None, res=None, **k):
    tile = tile or (8 if states == 16 else 16)
    seg = -(-L // (segs * tile)) * tile
    return P(states, split, tile, threads, seg, resident=res or max(1, 512 // threads), **k)
V = {
 "VMamba-T": [None, M(512,8,1), M(448,8,1), M(320,16,1), M(256,16,1), M(384,16,1), M(256,8,1)],
 "stage2": [None, M(224,8,2), M(416,8,1), M(448,16,1), M(256,16,1), M(128,16,2), M(128,8,4)],
 "stage3": [None, M(224,8,2), M(128,16,3), M(64,16,6), M(128,8,4)],
 "stage4": [None, M(64,8,8), M(32,16,12), M(32,8,16)],
 "DiM1024": [P_(8,2,t,4096) for t in (32,64,96,128,256)] + [P_(16,1,t,4096) for t in (32,64,128)] + [P_(4,4,t,4096) for t in (32,64,128,256)] + [P_(16,1,t,4096,2) for t in (32,64,128)] + [P_(8,2,64,4096,2), P_(8,2,128,4096,tile=8), P_(8,2,64,4096,res=4), P_(8,2,64,4096,polynomial=1), P_(8,2,64,4096,polynomial=2)],
 "DiM256": [P_(16,1,t,256) for t in (32,64,96,128,256)] + [P_(16,1,128,256,tile=16), P_(16,1,64,256,tile=16), P_(8,2,64,256), P_(8,2,128,256), P_(16,1,64,256,res=6), P_(16,1,64,256,res=10)],
 "P2": [P_(8,2,128,25600,2), P_(8,2,64,25600,2), P_(8,2,32,25600,2),P_(8,2,64,25600,1), P_(4,4,128,25600,1), P_(4,4,64,25600,1), P_(8,2,64,25600,4), P_(16,1,64,25600,4), P_(16,1,128,25600,4)],
 "P3": [P_(8,2,128,6400), P_(8,2,64,6400), P_(8,2,32,6400), P_(16,1,64,6400), P_(16,1,128,6400,2), P_(16,1,64,6400,2), P_(4,4,128,6400)],
}
V["P5"] = [None, P_(1,16,256,400,scans=4,res=2), P_(1,16,128,400,scans=4,res=4), P_(2,8,128,400,scans=4,res=4), P_(2,8,256,400,scans=4,res=2), P_(4,4,128,400,scans=4,res=4), P_(1,16,512,400,scans=4,res=1)]
V["P5x16"] = [None, P_(2,8,128,400,scans=4,res=4), P_(4,4,128,400,scans=4,res=4), P_(4,4,256,400,scans=4,res=2), P_(8,2,128,400,scans=4,res=4), P_(16,1,128,400,scans=4,tile=16,res=4)]
def one(inp, v, starts=None):
    tl.plan, tl.merged = (v, None) if isinstance(v, P) else (None, v or None)
    return cuda.scan(*inp, True, True, starts=starts)
# compile all in parallel with tiny batches
def warm(job):
    name, v = job
    try:
        inp = tuple(t[:1] if t is not None and t.dim() == 4 else t for t in small[name])
        one(inp, v)
    except Exception as e: p("compile", name, v, repr(e)[:200])
t0 = time.time()
small = {n: make(n) for n in ("VMamba-T", "stage2", "stage3", "stage4")}
for n in ("P5", "P5x16"): small[n] = make(n)
for n in ("DiM1024", "DiM256", "P2", "P3"):
    s = SHAPES[n]; SHAPES[n] = (1, *s[1:]); small[n] = make(n); SHAPES[n] = s
with ThreadPoolExecutor(16) as ex: list(ex.map(warm, [(n, v) for n, vs in V.items() for v in vs]))
torch.cuda.synchronize(); p("compiled", round(time.time() - t0, 1)); del small; tl.__dict__.clear()
VB = {"VMamba-T": [None, M(256,8,1), M(384,8,1), M(320,8,1), M(448,8,1)],
 "stage2": [None, M(256,8,1), M(288,8,1), M(384,8,1), M(128,8,2), M(224,8,1)],
 "stage3": [None, M(224,8,1), M(128,8,2), M(64,8,4), M(96,8,2)],
 "stage4": [None, M(64,8,4), M(32,8,8), M(64,8,3)]}
def back(inp, dy, st, v):
    tl.plan, tl.merged, tl.merged_back = None, None, v
    return cuda.scan_backward(dy, None, *inp, True, True, starts=st)
def warm_back(job):
    n, v = job
    try:
        i1 = tuple(t[:1] if t is not None and t.dim() == 4 else t for t in small[n])
        k = cuda.kept_states(*i1[:3]); st = torch.zeros(k[0], dtype=k[1], device="cuda")
        back(i1, torch.zeros_like(i1[0][:, :, 0]), st, v)
    except Exception as e: p("compile", n, v, repr(e)[:200])
small = {n: make(n) for n in VB}
with ThreadPoolExecutor(16) as ex: list(ex.map(warm_back, [(n, v) for n, vs in VB.items() for v in vs]))
del small
for n in VB:
    try:
        inp = make(n); tl.__dict__.clear()
        k = cuda.kept_states(*inp[:3]); st = torch.empty(k[0], dtype=k[1], device="cuda")
        tl.merged = None
        y, _ = cuda.scan(*inp, True, True, starts=st); dy = torch.randn_like(y)
        base = back(inp, dy, st, None)
        for v in VB[n]:
            g = back(inp, dy, st, v); g2 = back(inp, dy, st, v)
            p("back", n, v and tuple(v), f"{times(lambda: back(inp, dy, st, v)):.3f}", [f"{err(a, b):.1e}" for a, b in zip(g[:7], base)], all(torch.equal(a, b) for a, b in zip(g, g2)))
    except Exception: traceback.print_exc()
tl.__dict__.clear()
# check merged
for n in ("VMamba-T", "stage2", "stage3", "stage4"):
    try:
        inp = make(n)
        sub = tuple(t[:2] if t is not None and t.dim() == 4 else t for t in inp)
        d = tuple(t.double() if t is not None and t.is_floating_point() else t for t in sub)
        want = chunked.scan(*d, True, True)
        base, bl = one(inp, None)
        for v in V[n]:
            y, last = one(inp, v); y2, _ = one(inp, v)
            ms = times(lambda: one(inp, v))
            kept = cuda.kept_states(*inp[:3]); st = torch.empty(kept[0], dtype=kept[1], device="cuda")
            mk = times(lambda: one(inp, v, st))
            p(n, v and tuple(v), f"{ms:.3f} kept {mk:.3f}", f"err {err(y[:2], want[0]):.1e} last {err(last[:2], want[1]):.1e} vs old {err(y, base):.1e}", torch.equal(y, y2))
    except Exception: traceback.print_exc()
for n in ("DiM1024", "DiM256", "P3", "P2"):
    try:
        inp = make(n); base = None
        for v in V[n]:
            y, last = one(inp, v); base = y if base is None else base
            p(n, tuple(v), f"{times(lambda: one(inp, v)):.3f}", f"err {err(y[:1], base[:1]):.1e}")
    except Exception: traceback.print_exc()
def graphed(f):
    f(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    return times(g.replay, 40)
for n in ("P5", "P5x16"):
    try:
        inp = make(n); base = None
        for v in V[n]:
            y, last = one(inp, v); base = y if base is None else base
            y2, _ = one(inp, v)
            p(n, v and tuple(v), f"graph {graphed(lambda: one(inp, v))*1e3:.1f} us", f"err {err(y, base):.1e}", torch.equal(y, y2))
    except Exception: traceback.print_exc()
tl.__dict__.clear(); base = y = last = None
cuda._layout = layout_cached
cuda._layout.cache_clear()
# host path of P5
try:
    inp = make("P5"); f = lambda: cuda.scan(*inp, True, True)
    f(); torch.cuda.synchronize()
    ev = times(f, 200)
    t0 = time.perf_counter(); [f() for _ in range(500)]; h = (time.perf_counter() - t0) / 500; torch.cuda.synchronize(); tot = (time.perf_counter() - t0) / 500
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    gr = times(g.replay, 50); f2 = lambda: cuda.scan(*inp, True, True, want_state=False)
    f2(); torch.cuda.synchronize(); t0 = time.perf_counter(); [f2() for _ in range(500)]; p("host without state", (time.perf_counter() - t0) / 500e-6); torch.cuda.synchronize()
    p(f"P5 events {ev*1e3:.1f} us, host {h*1e6:.1f}, loop {tot*1e6:.1f}, graph {gr*1e3:.1f}")
    x = inp[0]
    t0 = time.perf_counter(); [x.new_empty((1,400,512)) for _ in range(2000)]; p(f"new_empty {(time.perf_counter()-t0)/2e-3:.2f} us")
    from mambavision.ops import multi_scan
    tab = order_table("cross", (20, 20), x.device)
    q = lambda: multi_scan(x[:, :, 0], *inp[1:6], orders=tab, grid=(20, 20), delta_bias=inp[6])
    with torch.no_grad():
        q(); torch.cuda.synchronize(); ev = times(q, 200)
        t0 = time.perf_counter(); [q() for _ in range(500)]; h = (time.perf_counter() - t0) / 500; torch.cuda.synchronize()
    p(f"P5 public events {ev*1e3:.1f} host {h*1e6:.1f}")
    import cProfile, pstats
    with torch.no_grad():
        pr = cProfile.Profile(); pr.enable(); [q() for _ in range(1000)]; pr.disable(); torch.cuda.synchronize()
    pstats.Stats(pr).sort_stats("tottime").print_stats(14)
except Exception: traceback.print_exc()
for n in SHAPES:
    try:
        inp = make(n)
        kept = cuda.kept_states(*inp[:3]); st = torch.empty(kept[0], dtype=kept[1], device="cuda") if kept else None
        y, last = cuda.scan(*inp, True, True, starts=st)
        dy = torch.randn_like(y)
        f = times(lambda: cuda.scan(*inp, True, True), 9); b = times(lambda: cuda.scan_backward(dy, None, *inp, True, True, starts=st), 9)
        p(n, f"forward {f:.3f} backward {b:.3f}")
    except Exception: traceback.print_exc()
# gate: fused against torch's
try:
    from mambavision.ops import selective_scan
    import torch.nn.functional as F
    for Bb, D, L, N in ((64, 2304, 256, 16), (8, 2304, 4096, 16)):
        r = lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16)
        u, d, z, Bm, C = r(Bb, D, L), r(Bb, D, L), r(Bb, D, L), r(Bb, 1, N, L), r(Bb, 1, N, L)
        A, Dp = -torch.rand(D, N, device="cuda"), torch.rand(D, device="cuda")
        with torch.no_grad():
            fused = lambda: selective_scan(u, d, A, Bm, C, Dp, z, None, True)
            bare = lambda: selective_scan(u, d, A, Bm, C, Dp, None, None, True)
            apart = lambda: (lambda y: (y.float() * F.silu(z.float())).to(u.dtype))(bare())
            p("gate", (Bb, D, L), f"fused {times(fused):.3f} apart {times(apart):.3f} none {times(bare):.3f} err {err(fused(), apart()):.1e}")
        ls = [v.clone().requires_grad_() for v in (u, d, Bm, C, z)]
        def step(fuse):
            y = selective_scan(ls[0], ls[1], A, ls[2], ls[3], Dp, ls[4] if fuse else None, None, True)
            if not fuse: y = (y.float() * F.silu(ls[4].float())).to(u.dtype)
            return torch.autograd.grad(y, ls, u)
        g1, g0 = step(True), step(False)
        p("gate step", f"fused {times(lambda: step(True), 7):.3f} apart {times(lambda: step(False), 7):.3f}", [f"{err(a, b):.1e}" for a, b in zip(g1, g0)])
        del ls, g1, g0
    for Bb, L, K, R, D in ((64, 3136, 4, 6, 192), (16, 6400, 4, 16, 256), (8, 4096, 1, 72, 2304)):
        low = torch.randn(Bb, L, K, R, device="cuda", dtype=torch.bfloat16); W = torch.randn(K, D, R, device="cuda", dtype=torch.bfloat16)
        f = lambda: (low.transpose(1, 2) @ W.transpose(1, 2)).transpose(1, 2)
        out = torch.empty(Bb, L, K, D, device="cuda", dtype=torch.bfloat16)
        p("delta GEMM", (Bb, L, K, R, D), f"{times(f):.3f} writing delta alone {times(lambda: out.fill_(1)):.3f}")
except Exception: traceback.print_exc()
