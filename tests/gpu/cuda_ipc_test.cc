// A slab of the CUDA backend mapped into a second process, which attends over it there with its own backend:
// the result is the same to the last bit. This is how an engine on the same GPU reads the daemon's pool
// without an RPC per layer.
#include <cuda_runtime.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_direct_device.h"
#include "tests/gpu/cuda_ipc_case.h"

namespace kvtide::testing {
namespace {

void WriteAll(int fd, const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd, p, bytes);
    ASSERT_GT(n, 0);
    p += n;
    bytes -= static_cast<size_t>(n);
  }
}

TEST(CudaIpc, ASecondProcessAttendsOverTheSameSlab) {
  auto backend = MakeCudaBackend();
  ASSERT_TRUE(backend.ok()) << backend.status();
  const BlockLayout layout = IpcLayout();
  auto slab = (*backend)->AllocateSlab(layout.block_bytes() * kIpcBlocks);
  ASSERT_TRUE(slab.ok()) << slab.status();
  ASSERT_TRUE(FillIpcBlocks(**backend, (*slab)->data()).ok());
  const std::vector<float> here = AttendIpcBlocks(**backend, (*slab)->data());
  ASSERT_FALSE(here.empty());
  for (float x : here) ASSERT_TRUE(std::isfinite(x));

  cudaIpcMemHandle_t handle;
  ASSERT_EQ(cudaIpcGetMemHandle(&handle, (*slab)->data()), cudaSuccess);
  int to_child[2], from_child[2];
  ASSERT_EQ(pipe(to_child), 0);
  ASSERT_EQ(pipe(from_child), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {  // a fresh program: CUDA does not survive a fork
    dup2(to_child[0], 0);
    dup2(from_child[1], 3);
    char flag[] = "--attend-by-ipc";
    char self[] = "/proc/self/exe";
    char* arguments[] = {self, flag, nullptr};
    execv(self, arguments);
    _exit(127);
  }
  close(to_child[0]);
  close(from_child[1]);
  WriteAll(to_child[1], &handle, sizeof(handle));
  close(to_child[1]);
  std::vector<float> there(here.size());
  size_t got = 0;
  while (got < there.size() * sizeof(float)) {
    const ssize_t n =
        read(from_child[0], reinterpret_cast<char*>(there.data()) + got, there.size() * sizeof(float) - got);
    if (n <= 0) break;
    got += static_cast<size_t>(n);
  }
  close(from_child[0]);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  ASSERT_EQ(got, there.size() * sizeof(float));
  EXPECT_EQ(there, here);
}

// Memory with a descriptor is ordinary memory for the backend, and is mapped a second time by it.
TEST(CudaDescriptors, ASecondMappingIsTheSameMemory) {
  CudaBackendOptions options;
  options.sharing = SlabSharing::kDescriptors;
  auto backend = MakeCudaBackend(options);
  ASSERT_TRUE(backend.ok()) << backend.status();
  const BlockLayout layout = IpcLayout();
  auto slab = (*backend)->AllocateSlab(layout.block_bytes() * kIpcBlocks);
  ASSERT_TRUE(slab.ok()) << slab.status();
  ASSERT_TRUE(FillIpcBlocks(**backend, (*slab)->data()).ok());
  const std::vector<float> here = AttendIpcBlocks(**backend, (*slab)->data());
  ASSERT_FALSE(here.empty());
  auto handle = (*slab)->Share();
  ASSERT_TRUE(handle.ok()) << handle.status();
  ASSERT_EQ(handle->kind, SlabHandle::Kind::kFile);
  auto device = MakeCudaDirectDevice("0");
  ASSERT_TRUE(device.ok()) << device.status();
  SlabHandle other = *handle;
  other.fd = ::dup(handle->fd);
  auto mapped = (*device)->Map(other);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  EXPECT_NE((*mapped)->data(), (*slab)->data());
  EXPECT_EQ(AttendIpcBlocks(**backend, (*mapped)->data()), here);
  // It lives as long as one of the mappings.
  slab->reset();
  EXPECT_EQ(AttendIpcBlocks(**backend, (*mapped)->data()), here);
  // What is no memory is an error, and its descriptor is closed.
  other.fd = ::open("/dev/null", O_RDWR);
  const int fd = other.fd;
  EXPECT_EQ((*device)->Map(other).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
}

}  // namespace

int AttendByIpc() {
  cudaIpcMemHandle_t handle;
  if (read(0, &handle, sizeof(handle)) != static_cast<ssize_t>(sizeof(handle))) return 2;
  auto backend = MakeCudaBackend();
  if (!backend.ok()) return 3;
  void* mapped = nullptr;
  if (cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) return 4;
  const std::vector<float> out = AttendIpcBlocks(**backend, static_cast<std::byte*>(mapped));
  if (out.empty()) return 5;
  const size_t bytes = out.size() * sizeof(float);
  const bool sent = write(3, out.data(), bytes) == static_cast<ssize_t>(bytes);
  (void)cudaIpcCloseMemHandle(mapped);
  return sent ? 0 : 6;
}

}  // namespace kvtide::testing
