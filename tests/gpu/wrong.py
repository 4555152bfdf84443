"""Kernels that are wrong on purpose: what `compute-sanitizer` must catch before its result counts.

    compute-sanitizer --tool memcheck python -m tests.gpu.wrong bounds
    compute-sanitizer --tool racecheck python -m tests.gpu.wrong race

Exit status: 0; the sanitizer gives its own.
"""

import ctypes
import sys

# Warps read from shared memory what other warps write, with no barrier between. Triton would put one there,
# so this is the driver's own language.
RACE = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry race(.param .u64 out) {
  .reg .u32 %r<7>;
  .reg .u64 %rd<5>;
  .shared .align 4 .b8 shared_words[512];
  ld.param.u64 %rd1, [out];
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, shared_words;
  shl.b32 %r3, %r1, 2;
  add.u32 %r4, %r2, %r3;
  st.shared.u32 [%r4], %r1;
  sub.u32 %r5, %r4, %r3;
  sub.u32 %r5, %r5, %r3;
  ld.shared.u32 %r6, [%r5+508];
  mul.wide.u32 %rd3, %r1, 4;
  add.u64 %rd4, %rd2, %rd3;
  st.global.u32 [%rd4], %r6;
  ret;
}
"""
THREADS = 128


def write_out_of_bounds() -> None:
    """Writes 128 elements past the end of an array of as many."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import triton as plgpu

    from pallas_kernels.launch import launch

    def kernel(_, out):
        plgpu.store(out.at[128 + jax.lax.iota(jnp.int32, 128)], jnp.ones(128, jnp.float32))

    array = jax.ShapeDtypeStruct((128,), jnp.float32)
    interpret = jax.default_backend() != "gpu"
    write = launch(
        kernel, grid=(1,), out_shape=array, name="wrong", num_warps=4, num_stages=1, interpret=interpret
    )
    jax.block_until_ready(jax.jit(write)(jnp.zeros(128, jnp.float32)))


def race() -> None:
    """Runs `RACE` through the CUDA driver.

    Raises:
      OSError: where there is no driver.
      RuntimeError: with the driver's error code.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments) -> None:
        if error := getattr(driver, name)(*arguments):
            raise RuntimeError(f"{name} failed with error {error}")

    device, context, module, function = ctypes.c_int(), *(ctypes.c_void_p() for _ in range(3))
    memory = ctypes.c_uint64()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), RACE)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"race")
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(4 * THREADS))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
    call("cuLaunchKernel", function, 1, 1, 1, THREADS, 1, 1, 0, None, parameters, None)
    call("cuCtxSynchronize")


if __name__ == "__main__":
    {"bounds": write_out_of_bounds, "race": race}[sys.argv[1]]()
