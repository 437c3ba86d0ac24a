"""Offsets into XLA's FFI call frame and the structures that it points to.

XLA calls a kernel with the address of an ``XLA_FFI_CallFrame``, a C structure of the header ``c_api.h`` in
``jax.ffi.include_dir()``. These are the offsets of the fields that the kernels read, in bytes, on 64-bit machines.
A major version of the API keeps them; a minor one only adds fields at the ends. A test compares them with the header.
"""

MAJOR = 0
MINOR = 3
"""The version of the API that the offsets are taken from: the lowest for which they are right."""

# XLA_FFI_CallFrame
FRAME_SIZE, FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_STAGE = 0, 8, 16, 24, 32
# XLA_FFI_Args args, XLA_FFI_Rets rets, XLA_FFI_Attrs attrs in it: how many, and the array of pointers to them
FRAME_ARGS_COUNT, FRAME_ARGS, FRAME_RETS_COUNT, FRAME_RETS, FRAME_ATTRS = 40 + 16, 40 + 32, 80 + 16, 80 + 32, 120 + 40
MIN_FRAME_SIZE = 168
STAGE_EXECUTE = 3

# XLA_FFI_Extension_Base and XLA_FFI_Metadata_Extension
EXTENSION_TYPE, EXTENSION_NEXT, EXTENSION_METADATA = 8, 16, 24
TYPE_METADATA = 1
# XLA_FFI_Metadata, with an XLA_FFI_Api_Version in it
METADATA_MAJOR, METADATA_MINOR, METADATA_TRAITS = 8 + 16, 8 + 20, 32

# XLA_FFI_Buffer
BUFFER_DATA, BUFFER_RANK, BUFFER_DIMS = 24, 32, 40
# XLA_FFI_Scalar, an attribute
SCALAR_VALUE = 8

# XLA_FFI_Api: its version, and pointers to functions in the order of the header
API_SIZE, API_MAJOR, API_MINOR = 0, 16 + 16, 16 + 20
API_ERROR_DESTROY, API_SCHEDULE, API_THREADS = 48 + 2 * 8, 48 + 11 * 8, 48 + 12 * 8
MIN_API_SIZE = API_THREADS + 8
# XLA_FFI_Error_Destroy_Args
DESTROY_SIZE, DESTROY_ERROR = 24, 16
# XLA_FFI_ThreadPool_Schedule_Args
SCHEDULE_SIZE, SCHEDULE_CONTEXT, SCHEDULE_TASK, SCHEDULE_DATA = 40, 16, 24, 32
# XLA_FFI_ThreadPool_NumThreads_Args
THREADS_SIZE, THREADS_CONTEXT, THREADS_RESULT = 32, 16, 24
