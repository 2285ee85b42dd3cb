from scan_bench import *
cuda._layout = layout_cached
name, kind = sys.argv[1:3]
inp = make(name)
k = cuda.kept_states(*inp[:3]); st = torch.empty(k[0], dtype=k[1], device="cuda")
if len(sys.argv) > 3: tl.merged_back = None if sys.argv[3] == "none" else M(*map(int, sys.argv[3].split(",")))
y, _ = cuda.scan(*inp, True, True, starts=st)
if kind == "back": cuda.scan_backward(torch.randn_like(y), None, *inp, True, True, starts=st)
torch.cuda.synchronize()
