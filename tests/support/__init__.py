"""What tests share, one subject per file; no test module imports another.

Ranks and where they run:

- `process_ranks`: gloo ranks as processes, a reused pool and throw-away sets (the fixture `workers` is a pool of five)
- `thread_ranks`: ranks as threads of one process, without a process group
- `torchrun`: a script under torchrun, as a user starts it
- `traffic`: bytes that ranks receive, and the keys that they have to receive
- `errors`: errors that jobs on ranks end in, as text

What is compared:

- `model_parity`: a model on the ring beside eager on one device
- `zoo_parity`: the same for a model of the zoo, with its gathers, FLOPs and memory
- `attention_parity`: ring attention on thread ranks beside dense attention
- `sharded_ops`: one op on shards beside the op on one device
- `tile_oracle`: attention of one tile by its definition, and the cases for kernels

What it is compared on:

- `models`: tiny models of each kind, with batches
- `zoo`, `zoo_text`, `zoo_entry`, `zoo_modules`: tiny models of the public classes that people train; the newer language
  models; what an entry is; their modules that no library has
- `pattern_models`: patterns as boolean tensors, and a model that takes one
- `dilation_cases`: random dilated attentions
- `random_plans`: random attentions as a plan would have them
- `schedule_faults`: faults put into the programs of all ranks
- `executed`: the programs of all ranks, executed on integers, to tell what a fault changes
- `mask_expressions`: Hypothesis strategies for mask expressions
- `whole_steps`: masked steps as whole calls on a CPU

What is read:

- `pipeline_stages`: the stages of the pipeline one by one, and the graphs that they hand on
- `captured`: a function's graph as captured, run beside the function
- `detected`: the mask that is found of an attention, beside the one that the function computes
- `programs`: problems of self-attention, and programs with a part changed
- `generated_code`: the calls and transfers in the code that Inductor generates
- `live_buffers`: the same code's buffers, and what is alive when
- `described_gpu`: a GPU that is described, so that Inductor writes its code without one

What is shown:

- `page_models`: small models for the page, and their reports
- `browser`: a real browser
- `page_pictures`: takes the pictures of docs/page.md

Where operators run without a device:

- `fake_cuda`: their bodies on fake CUDA tensors
- `graph_snapshot`: all that is made of five models, as files, to compare two versions
- `package_layers`: the layers of the package as data
- `repository`: where the repository is
- `marks`: marks for single cases of parametrised tests
"""
