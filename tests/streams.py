"A device whose streams run at any time that the waits allow: vector clocks tell whether two accesses have an order"
import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastai_bn import copies
from fastai_bn.operations import signature

class Race(AssertionError): pass

class Stream:
    "What is queued here happens in turn; its clock says of each stream how far it is known to have come"
    def __init__(self, device, name): self.device,self.name,self.clock = device,name,{name:0}

    def __enter__(self): self.device.current.append(self)

    def __exit__(self, *exc): self.device.current.pop()

    def wait_stream(self, other): self.wait_event(other.record_event())

    def record_event(self): return dict(self.clock)

    def wait_event(self, event):
        for k,n in event.items(): self.clock[k] = max(self.clock.get(k, 0), n)

class Device(TorchDispatchMode):
    """The CPU as a device with three streams. Entered before a pager, it sees each operation as a kernel that reads and
    writes; copies, and what frees memory, are seen where they are asked for"""
    def __init__(self):
        super().__init__()
        self.main,self.into,self.out = (Stream(self, k) for k in ('main','into','out'))
        self.current = [self.main]
        self.writes,self.reads = {},{}  # by memory: when it was written to last, and read since, by stream
        self.races,self.seen,self.kept = [],set(),{}

    def launch(self, reads, writes, what, stream=None):
        "A kernel, a copy or the end of a piece of memory"
        s = stream or self.current[-1]
        s.clock[s.name] += 1
        for k in {*reads, *writes}: self._after(s, self.writes.get(k, {}), k, what)
        for k in writes:
            self._after(s, self.reads.pop(k, {}), k, what)
            self.writes[k] = {s.name:s.clock[s.name]}
        for k in {*reads}-{*writes}: self.reads.setdefault(k, {})[s.name] = s.clock[s.name]

    def _after(self, s, accesses, memory, what):
        "Does `s` know of all `accesses`?"
        late = [k for k,n in accesses.items() if s.clock.get(k, 0) < n]
        if late: self.races.append(f'{what} on {s.name} beside {late} on {memory}')

    def memory(self, st):
        "A name for the memory of a storage, which ends with it"
        key = st._cdata
        if key not in self.kept:
            # Registered before the pager's, so called after it
            self.kept[key] = weakref.ref(st, lambda _: self.free(key))
        return key

    def free(self, key):
        "The allocator gives memory to the next operation of the compute stream"
        self.launch((), (key,), 'free', self.main)
        for o in (self.writes, self.reads, self.kept): o.pop(key, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kernel(func, args, kwargs or {}, out)
        return out

    def kernel(self, func, args, kwargs, out):
        "An operation on the compute stream"
        written = signature(func).written(args, kwargs)
        def memories(trees):
            return [self.memory(t.untyped_storage()) for t in tree_iter(trees) if isinstance(t, torch.Tensor)]
        if func.is_view: return memories(out)
        self.launch(memories((args, kwargs)), memories((written, out)), func._schema.name)

@contextmanager
def on_device(monkeypatch):
    "Within, the CPU has streams"
    device,copy_,resize_,run = Device(),torch.UntypedStorage.copy_,torch.UntypedStorage.resize_,copies.Copies.run
    def copied(dst, src, non_blocking=False):
        device.launch([device.memory(src)], [device.memory(dst)], 'copy')
        return copy_(dst, src)
    def resized(st, n):
        if n == 0: device.launch((), (device.memory(st),), 'free', device.main)
        return resize_(st, n)
    def made(self, func, args, kwargs):
        res = run(self, func, args, kwargs)
        device.kernel(func, args, kwargs, res)
        return res
    with monkeypatch.context() as m:
        m.setattr(torch.UntypedStorage, 'copy_', copied)
        m.setattr(torch.UntypedStorage, 'resize_', resized)
        m.setattr(copies.Copies, 'run', made)
        m.setattr(torch.accelerator, 'current_stream', lambda d: device.current[-1])
        m.setattr(copies, 'side_streams', lambda d: (device.into, device.out))
        m.setattr(copies.Copies, 'allocate', lambda self,n: torch.empty(n, dtype=torch.uint8).untyped_storage())
        with device: yield device
