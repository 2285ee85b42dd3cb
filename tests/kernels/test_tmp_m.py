import pytest, torch, itertools
from mambavision.kernels import cuda, reference
def case(batch,L,D,K,dt,seed=0,bias=True,order=True,init=True):
    g=torch.Generator().manual_seed(seed)
    r=lambda *s: torch.randn(*s,generator=g)
    x=r(batch,L,1,D).to(dt); delta=r(batch,L,K,D).to(dt); A=-torch.rand(K,D,1,generator=g)-.1
    B=r(batch,L,K,1).to(dt); C=r(batch,L,K,1).to(dt)
    Dp=r(K,D) if bias else None; b=r(K,D) if bias else None; h=r(batch,K,D,1) if init else None
    o=torch.stack([torch.randperm(L,generator=g) for _ in range(K)]).int() if order else None
    return x,delta,A,B,C,Dp,b,h,o
@pytest.mark.parametrize("L,D,K,dt,steps,threads",[(70,16,2,torch.float32,8,64),(133,32,4,torch.bfloat16,8,64),(300,16,3,torch.float16,16,96),(1,16,1,torch.float32,8,32),(257,16,4,torch.bfloat16,16,64),(49,48,4,torch.bfloat16,8,64)])
@pytest.mark.parametrize("softplus",[True,False])
@pytest.mark.parametrize("opts",[True,False])
def test_m(emulator,L,D,K,dt,steps,threads,softplus,opts,monkeypatch):
    args=case(2,L,D,K,dt,bias=opts,order=opts,init=opts)
    if not softplus: args=(args[0],.3*args[1].abs(),*args[2:6],None if args[6] is None else .2*args[6].abs(),*args[7:])
    monkeypatch.setattr(cuda,'merged_plan',lambda *a, backward=False: cuda.Merged(threads,steps,1))
    a64=[v.double() if v is not None and v.is_floating_point() else v for v in args]
    cuda._layout.cache_clear()
    want=reference.scan(*a64,softplus,True)
    outs=[]
    kept=cuda.kept_states(*args[:3])
    for order in (0,1,5):
        emulator.order=order
        starts=torch.full(kept[0],float('nan'),dtype=kept[1])
        y,last=cuda.scan(*args,softplus,True,starts=starts)
        outs.append((y,last,starts))
    assert emulator.launches[-1][0]=='scan_merged'
    for o in outs[1:]:
        for a,b in zip(o,outs[0]): assert torch.equal(a,b)
    cuda._layout.cache_clear()
    monkeypatch.setattr(cuda,'merged_plan',lambda *a, backward=False: None)
    s2=torch.full(kept[0],float('nan'),dtype=kept[1])
    y2,l2=cuda.scan(*args,softplus,True,starts=s2)
    e=lambda a,b: float((a.double()-b.double()).norm()/b.double().norm())
    es=[e(y,want[0]),e(y2,want[0]),e(last,want[1]),e(l2,want[1]),e(starts,s2)]
    print(es)
    lim={torch.float32:2e-6,torch.bfloat16:4e-3,torch.float16:5e-4}[dt]
    assert es[0]<lim and es[2]<2e-5 and not es[4]>2e-5

@pytest.mark.parametrize("L,D,K,dt,threads",[(70,16,2,torch.float32,64),(133,32,4,torch.bfloat16,64),(300,16,3,torch.float16,96),(1,16,1,torch.float32,32),(49,48,4,torch.bfloat16,64)])
@pytest.mark.parametrize("softplus",[True,False])
@pytest.mark.parametrize("opts",[True,False])
def test_back(emulator,L,D,K,dt,threads,softplus,opts,monkeypatch):
    args=case(2,L,D,K,dt,bias=opts,order=opts,init=opts)
    if not softplus: args=(args[0],.3*args[1].abs(),*args[2:6],None if args[6] is None else .2*args[6].abs(),*args[7:])
    monkeypatch.setattr(cuda,'merged_plan',lambda *a, backward=False: cuda.Merged(threads,8,1))
    cuda._layout.cache_clear()
    kept=cuda.kept_states(*args[:3]); starts=torch.full(kept[0],float('nan'),dtype=kept[1])
    y,last=cuda.scan(*args,softplus,True,starts=starts)
    g=torch.Generator().manual_seed(7)
    dy=torch.randn(y.shape,generator=g).to(dt); dl=torch.randn(last.shape,generator=g) if opts else None
    leaves=[v.double().requires_grad_() if v is not None and v.is_floating_point() else v for v in args]
    w=reference.scan(*leaves,softplus,True)
    giv=[v for v in leaves[:8] if v is not None]
    exact=torch.autograd.grad(w if opts else w[:1],giv,[dy.double(),dl.double()] if opts else [dy.double()])
    outs=[]
    for order in (0,1,5):
        emulator.order=order
        outs.append(cuda.scan_backward(dy,dl,*args,softplus,True,starts=starts))
    assert any('merged_back' in n for n,_,_ in emulator.launches)
    for o in outs[1:]:
        for a,b in zip(o,outs[0]): assert torch.equal(a,b)
    got=[v for v,l in zip(outs[0],leaves[:8]) if l is not None]
    e=lambda a,b: float((a.double()-b.double()).norm()/b.double().norm().clamp_min(1e-9))
    es=[e(a,b) for a,b in zip(got,exact)]
    print(["%.1e"%v for v in es])
    lim={torch.float32:5e-6,torch.bfloat16:6e-3,torch.float16:1e-3}[dt]
    assert max(es)<lim
