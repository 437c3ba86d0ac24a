"""CPU backend: kernels that LLVM compiles for this processor, by way of llvmlite.

A kernel is a frozen dataclass (``layer_kernels.Step``). Its ``write`` writes LLVM instructions through the *LLVM
builder*; ``ffi`` compiles them, once a machine, and registers the function with XLA; ``ffi.call`` puts a call into a
compiled program. When the program runs, XLA calls the function with a *call frame*. The function reads addresses and
sizes off it into a *launch*, asks XLA's *threads* for help, and goes through its *phases*, each cut into *tasks*.

- ``layer_calls``: layers, embedding and head as the model calls them; what is taken, and what is left to XLA
- ``layer_inputs``, ``layer_kernels``: what a layer begins with, and a whole one for decoding; for prompts, what comes
  before and after attention
- ``delta_net_calls``, ``delta_net_kernel``, ``delta_net_convolution``: a whole layer with a delta net
- ``prompt_attention``, ``decode_attention``, ``cache_writes``: attention over a KV cache, and writing to it
- ``embedding_and_head``, ``sampling_kernels``: rows of the embedding, final norm, logits; thresholds, draws, argmax
- ``few_row_matmul``, ``many_row_matmul``: matrix multiplication for decoding, and for prompts
- ``kernel_building_blocks``: RMSNorm, rotation, weight matrices, loops: what kernels are put together from
- ``vector_ops``, ``llvm_builder``: vector operations, and the small language that all of this is written in
- ``probes``: kernels that only read or multiply, to measure the machine
- ``threads``, ``ffi_call_frame``, ``ffi``: launches and phases; XLA's structures; compiling, caching, registering
"""
