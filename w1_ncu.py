from scan_bench import *
inp = make(sys.argv[1]); cuda.scan(*inp, True, True); torch.cuda.synchronize()
