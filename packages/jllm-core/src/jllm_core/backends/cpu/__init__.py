"""CPU backend: kernels that LLVM compiles for this processor. Needs the extra ``jllm-core[cpu]``."""
