"""Gradient accumulation makes 2 x 16 look like 32 to the optimizer, but not to BatchNorm (BN): it still normalises with
2 samples, and the running statistics, which inference uses, follow. `fastai_bn` gives a
[fastai](https://docs.fast.ai) user the repairs in one line each:

```python
# one optimizer step, and one update of the running statistics, for 16 micro-batches
learn = Learner(dls, model, cbs=AccumulateGradBN(n_step=16))
# BN over all 16: the large batch itself, in 6 GiB of activations
learn = Learner(dls, model, cbs=AccumulateGradBN(n_step=16, bn_bs='window', budget='auto'))
# population statistics instead of a moving average
learn.precise_bn()
```

With `bn_bs='window'` training *is* the training of the large batch, bit for bit where kernels are deterministic, as on
a CPU. You decide how much device memory it takes: a pager has activations wait in host memory. No micro-batch
statistics, no approximation, no change to the model.

Modules:

- `fastai_bn.accumulate`: `AccumulateGradBN`: one step for several micro-batches, BatchNorm over as many as you say
- `fastai_bn.advice`: `learn.memory_plan()`: does the large batch fit on the device, and which arguments make it fit?
- `fastai_bn.all`: `from fastai_bn.all import *`
- `fastai_bn.batches`: A DataLoader's micro-batches, joined and cut to the batches that BatchNorm is to see
- `fastai_bn.capture`: What BatchNorm layers see, from the native kernels at no cost; and updates that wait
- `fastai_bn.choice`: What is made again instead of moved, looking at what will be on the device then
- `fastai_bn.copies`: Memory budgets, host buffers, and the stream on which copies run beside the computation
- `fastai_bn.counting`: Forward and backward pass inside the real pager, on tensors without memory
- `fastai_bn.demo`: `python -m fastai_bn.demo`: the main job end to end, in minutes on two cores
- `fastai_bn.diversion`: For a while a BN layer's update goes to somebody else, and its own running statistics stay
- `fastai_bn.draw`: `make_hpa`: cells drawn in the layout of the Human Protein Atlas, for demonstrations and tests
- `fastai_bn.epochs`: How a DataLoader's epoch becomes windows, and how fastai's training loop runs inside them
- `fastai_bn.fakes`: A model of any size runs on tensors that have shapes and no memory
- `fastai_bn.forecast`: What a block of operations did, the next one will do: who is needed last leaves first
- `fastai_bn.groupnorm`: `bn_to_gn`: GroupNorm in place of BatchNorm, in any model; `weight_standardize` to go with it
- `fastai_bn.hpa`: The Kaggle layout of 4-channel fluorescence images with 28 labels, read into `DataLoaders`
- `fastai_bn.hpafiles`: Which file holds which channel of which image
- `fastai_bn.keep`: `keep_running_stats`: passes that leave BN's running statistics alone, as checkpointing's second one
- `fastai_bn.layers`: Its running statistics, its own `forward`, and the errors that name it
- `fastai_bn.lockstep`: `MicroBatched`: one large batch computed in micro-batches that meet at every BatchNorm layer
- `fastai_bn.making`: What was dropped is made by the calls that made it, and a check says whether the bits are the same
- `fastai_bn.moments`: Count, mean and M2 of what BatchNorm layers see: statistics that merge
- `fastai_bn.mover`: Who leaves for an operation, and who returns ahead of time
- `fastai_bn.normalize`: `image_normalize`: every image by its own statistics; `ImageNormalize`: the same in batches
- `fastai_bn.operations`: What an operation uses, writes to and makes
- `fastai_bn.paging`: `ActivationPager`: any model within a fixed amount of device memory, bit for bit the same
- `fastai_bn.plan`: `memory_plan`: what a batch takes, and what each remedy would, before anything is allocated
- `fastai_bn.pooled`: BatchNorm over micro-batches that are never together: three autograd functions and their gradient
- `fastai_bn.population`: The statistics of a population with fixed weights: inference should normalise with them
- `fastai_bn.precise`: `precise_bn`: population statistics of the final weights, not an average over changing ones
- `fastai_bn.processes`: Which processes train together, over which of them BN normalises, and what they add up
- `fastai_bn.reads`: `print(t)` is no operation: what reads a tensor's memory directly brings the tensor back first
- `fastai_bn.recipes`: How the content of a storage came about, written down so that the same calls make it again
- `fastai_bn.records`: What the pager knows of one storage, and how a storage leaves and returns
- `fastai_bn.refusals`: What happens when the device has no memory left: others leave, and the operation runs again
- `fastai_bn.remaker`: What can be made again is dropped, where that costs less, and made when an operation needs it
- `fastai_bn.replay`: What a policy would move: demand paging of a recorded order
- `fastai_bn.report`: How far off running statistics are, how noisy BatchNorm's batches are, and what to do about it
- `fastai_bn.rows`: Centre and scale of each row of a matrix, precise at any offset, with NumPy's percentiles
- `fastai_bn.samples`: The one place that knows what a sample is: batches are counted, cut and joined
- `fastai_bn.sampling`: Which samples a population is measured on: each once, and no random number is drawn for it
- `fastai_bn.schedule`: When copies begin: out as soon as nobody needs a storage for long, in as soon as there is room
- `fastai_bn.storages`: Who is on the device, and how many bytes that is
- `fastai_bn.submission`: `submission_table`: `Id,Predicted` for a competition; `best_thresholds`: one threshold a label
- `fastai_bn.threads`: The settings of a thread, and how to put them back for a while
- `fastai_bn.toolarge`: What is said when an operation does not fit into the budget alone
- `fastai_bn.tracker`: Every operation belongs to a layer, in the backward pass, too
- `fastai_bn.tries`: A window that does not fit although nothing else is on the device runs once more, in lock step
- `fastai_bn.turns`: Micro-batches that run side by side and wait for each other: `LockStep`
- `fastai_bn.undo`: Stand in for somebody's method, and put it back whatever happens
- `fastai_bn.unet`: `gn_unet_learner`: fastai's `unet_learner` with GroupNorm everywhere, or in the decoder alone
- `fastai_bn.virtual`: What a window takes on a graphics card that is not there: the real pager under a clock
- `fastai_bn.window`: The micro-batches of one optimizer step, in any PyTorch loop"""

__version__ = "0.1.0"
