"""Gradient accumulation of 16 micro-batches of 2 images (2 x 16) steps like a batch of 32, but BatchNorm (BN) still
normalises over 2 images; `fastai_bn` gives users of [fastai](https://docs.fast.ai) the large batch itself.

```python
# one optimizer step, and one update of the running statistics, for 16 micro-batches
learn = Learner(dls, model, cbs=AccumulateGradBN(n_step=16))
# or BN over all 16, too: the large batch itself, in the memory that the device has
learn = Learner(dls, model, cbs=AccumulateGradBN(n_step=16, bn_bs='window', budget='auto'))
# after training: the data's statistics in place of BN's moving averages
learn.precise_bn()
```

Modules:

- `fastai_bn.accumulate`: `AccumulateGradBN`: one step for several micro-batches, BatchNorm over `bn_bs` samples
- `fastai_bn.advice`: `learn.memory_plan()`: does the large batch fit on the device, and which arguments make it fit?
- `fastai_bn.all`: `from fastai_bn.all import *`
- `fastai_bn.batches`: Join and cut a DataLoader's micro-batches to the batches that BatchNorm sees
- `fastai_bn.capture`: `capture_moments`: read the moments that BatchNorm layers compute anyway, and hold updates back
- `fastai_bn.choice`: Choose which storages to make again instead of moving them, by what will be on the device then
- `fastai_bn.copies`: Memory budgets, host buffers, and the streams on which copies run beside the computation
- `fastai_bn.counting`: Run forward and backward passes inside the real pager, on tensors without memory
- `fastai_bn.demo`: `python -m fastai_bn.demo`: the main job end to end, in minutes on two cores
- `fastai_bn.diversion`: Send a BN layer's updates to a taker for a while, and leave its own running statistics alone
- `fastai_bn.draw`: `make_hpa` draws cells in the layout of the Human Protein Atlas, for demonstrations and tests
- `fastai_bn.epochs`: Divide a DataLoader's epoch into windows, and run fastai's training loop inside them
- `fastai_bn.fakes`: Run a model of any size on tensors that have shapes and no memory
- `fastai_bn.forecast`: Each block of operations repeats the one before, so the storage needed last leaves first
- `fastai_bn.groupnorm`: `bn_to_gn` replaces BatchNorm by GroupNorm in any model; `weight_standardize` goes with it
- `fastai_bn.hpa`: `HPADataLoaders.from_folder`: 4-channel fluorescence images with 28 labels, in Kaggle's layout
- `fastai_bn.hpafiles`: Find the file of each channel of each image
- `fastai_bn.keep`: `keep_running_stats`: run passes that leave BN's running statistics alone, as checkpointing needs
- `fastai_bn.layers`: Its running statistics, its own `forward`, and the errors that name it
- `fastai_bn.lockstep`: `MicroBatched`: one large batch computed in micro-batches that meet at every BatchNorm layer
- `fastai_bn.making`: Make dropped storages again by the calls that made them, and check that the bits are the same
- `fastai_bn.moments`: `Moments`: count, mean and M2 of the values that BatchNorm layers see
- `fastai_bn.mover`: Which storages leave for an operation, and which return ahead of time
- `fastai_bn.normalize`: `image_normalize`: normalise each image by its own statistics; `ImageNormalize`: in batches
- `fastai_bn.operations`: Find the storages that an operation uses, writes to and makes
- `fastai_bn.paging`: `ActivationPager`: any model within a fixed amount of device memory, bit for bit the same
- `fastai_bn.picture`: `picture`: what the BN batch does to a training, and what a large one takes under a budget
- `fastai_bn.plan`: `memory_plan`: how much memory a batch takes, and each remedy, before anything is allocated
- `fastai_bn.pooled`: BatchNorm over micro-batches that are never together: three autograd functions and their gradient
- `fastai_bn.population`: The statistics of a population with fixed weights: inference should normalise with them
- `fastai_bn.precise`: `precise_bn`: population statistics of the final weights, not an average over changing ones
- `fastai_bn.processes`: Find the processes that train together and those over which BN normalises, and sum over them
- `fastai_bn.reads`: `print(t)` is not an operation: a direct read of a tensor's memory brings the tensor back first
- `fastai_bn.recipes`: Record how the content of a storage came about, so that the same calls make it again
- `fastai_bn.records`: What the pager knows of one storage, and how a storage leaves and returns
- `fastai_bn.refusals`: When the device has no memory left, other storages leave, and the operation runs again
- `fastai_bn.remaker`: Drop storages that are cheaper to make again, and make them when an operation needs them
- `fastai_bn.replay`: Count the bytes that a policy would move: demand paging of a recorded order
- `fastai_bn.report`: How far off running statistics are, how noisy BatchNorm's batches are, and what to do about it
- `fastai_bn.rows`: Measure centre and scale of each row of a matrix, precisely at any offset, with NumPy's percentiles
- `fastai_bn.samples`: Count, cut and join the samples of a batch: the one place that defines what a sample is
- `fastai_bn.sampling`: Choose the samples that a population is measured on: each once, without drawing a random number
- `fastai_bn.schedule`: Start each copy out right after the last use, and each copy in as soon as there is room
- `fastai_bn.storages`: Which storages are on the device, and how many bytes they take
- `fastai_bn.submission`: `submission_table`: `Id,Predicted` for a competition; `best_thresholds`: a threshold per label
- `fastai_bn.threads`: The settings of a thread, and how to put them back for a while
- `fastai_bn.toolarge`: Warn when a single operation does not fit into the budget
- `fastai_bn.tracker`: Find the layer of every operation, in the forward and the backward pass
- `fastai_bn.tries`: Undo a window in which one operation is too large for the device, and run it again in lock step
- `fastai_bn.turns`: Micro-batches that run side by side and wait for each other: `LockStep`
- `fastai_bn.undo`: Stand in for an object's method, and put the method back whatever happens
- `fastai_bn.unet`: `gn_unet_learner`: fastai's `unet_learner` with GroupNorm everywhere, or in the decoder alone
- `fastai_bn.virtual`: `Card`: model the time of a window on a graphics card that you do not have, with the real pager
- `fastai_bn.window`: `Window`: the micro-batches of one optimizer step, in any PyTorch loop"""

__version__ = "0.2.0"
