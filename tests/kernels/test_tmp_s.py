import pytest, torch
from mambavision.kernels import cuda, reference
def case(batch,L,D,K,N,dt,seed=0,opts=True):
    g=torch.Generator().manual_seed(seed)
    r=lambda *s: torch.randn(*s,generator=g)
    x=r(batch,L,1,D).to(dt); delta=r(batch,L,K,D).to(dt); A=-torch.rand(K,D,N,generator=g)-.1
    B=r(batch,L,K,N).to(dt); C=r(batch,L,K,N).to(dt)
    return x,delta,A,B,C,r(K,D),r(K,D),r(batch,K,D,N),torch.stack([torch.randperm(L,generator=g) for _ in range(K)]).int()
@pytest.mark.parametrize("L,D,K,N,dt,states,split,threads",[(35,6,2,16,torch.float32,1,16,64),(20,9,4,16,torch.bfloat16,1,16,256),(20,9,4,16,torch.bfloat16,2,8,128),(40,17,3,5,torch.float16,2,4,96)])
def test_s(emulator,L,D,K,N,dt,states,split,threads,monkeypatch):
    args=case(2,L,D,K,N,dt)
    orig=cuda.plan
    monkeypatch.setattr(cuda,'plan',lambda *a,backward: cuda.Plan(states,split,16,threads,-(-L//16)*16,scans=K))
    cuda._layout.cache_clear()
    want=reference.scan(*[v.double() if v.is_floating_point() else v for v in args],True,True)
    outs=[]
    for order in (0,1,5):
        emulator.order=order
        outs.append(cuda.scan(*args,True,True))
    assert len(emulator.launches)==3
    for o in outs[1:]:
        for a,b in zip(o,outs[0]): assert torch.equal(a,b)
    e=lambda a,b: float((a.double()-b.double()).norm()/b.double().norm())
    es=[e(outs[0][0],want[0]),e(outs[0][1],want[1])]
    print(es)
    lim={torch.float32:2e-6,torch.bfloat16:4e-3,torch.float16:5e-4}[dt]
    assert es[0]<lim and es[1]<2e-5
