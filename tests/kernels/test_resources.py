"""Occupancy against NVIDIA's own calculator, and the committed table against the compiler."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosear.errors import ConfigError
from mosear.kernels.chips import CHIPS, Chip, chip_of, occupancy

CALCULATOR = """
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cuda_occupancy.h>
extern "C" int ctas(int major, int minor, int multiprocessors, int threads, int shared_total, int shared_cta, int registers,
                    int shared, int block) {
  cudaOccDeviceProp p;
  p.computeMajor = major, p.computeMinor = minor, p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = threads;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.sharedMemPerBlock = 49152;
  p.sharedMemPerMultiprocessor = shared_total, p.numSms = multiprocessors, p.sharedMemPerBlockOptin = shared_cta;
  p.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0, f.partitionedGCConfig = PARTITIONED_GC_OFF;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = shared, f.numBlockBarriers = 1;
  cudaOccDeviceState s;
  s.cacheConfig = CACHE_PREFER_NONE, s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult r;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, block, shared)) return -1;
  return r.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def calculator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    spec = importlib.util.find_spec("triton")
    if not compiler or not spec or not spec.origin:
        pytest.skip("needs a C++ compiler, and triton's cuda_occupancy.h")
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "o.cc").write_text(CALCULATOR)
    flags = ["-shared", "-fPIC", "-O1", f"-I{include}", str(folder / "o.cc"), "-o", str(folder / "o.so")]
    subprocess.run([compiler, *flags], check=True)
    return ctypes.CDLL(str(folder / "o.so"))


@given(
    chip=st.sampled_from(CHIPS),
    registers=st.integers(16, 255),
    shared=st.integers(0, 232448),
    warps=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_occupancy_is_nvidias(calculator: ctypes.CDLL, chip: Chip, registers: int, shared: int, warps: int) -> None:
    found = occupancy(chip, registers=registers, shared_bytes=shared, warps=warps)
    if shared > chip.shared_per_cta:
        none_by_registers = not occupancy(chip, registers=registers, shared_bytes=0, warps=warps).ctas
        assert found.ctas == 0 and found.limits == (*(("registers",) if none_by_registers else ()), "shared")
        return
    expected = calculator.ctas(
        chip.arch // 10, chip.arch % 10, chip.multiprocessors, 32 * chip.warps, chip.shared_bytes, chip.shared_per_cta,
        registers, shared, 32 * warps,
    )  # fmt: skip
    assert found.ctas == expected
    assert found.limits or not found.ctas


def test_tensor_memory_limits_too() -> None:
    b200 = chip_of(100)
    found = occupancy(b200, registers=64, shared_bytes=1024, warps=4, tensor_columns=256)
    assert (found.ctas, found.limits) == (2, ("tensor memory",))


def test_an_unknown_arch_is_refused() -> None:
    with pytest.raises(ConfigError, match="arch is 75"):
        chip_of(75)
