// Planted errors that a sanitizer must report: out-of-bounds write, shared-memory race, read of memory that nothing wrote.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(float* p, int n) { p[n + threadIdx.x] = 1.0f; }

__global__ void race(float* p) {
  __shared__ float shared[32];
  shared[threadIdx.x % 32] = float(threadIdx.x);
  p[threadIdx.x] = shared[(threadIdx.x + 1) % 32];
}

__global__ void uninitialised(float* p) { p[0] = p[threadIdx.x + 1] + 1.0f; }

int main(int argc, char** argv) {
  const char* which = argc > 1 ? argv[1] : "";
  float* p = nullptr;
  if (cudaMalloc(&p, 1024 * sizeof(float)) != cudaSuccess) return 2;
  if (!std::strcmp(which, "out-of-bounds")) out_of_bounds<<<1, 32>>>(p, 1024);
  if (!std::strcmp(which, "race")) race<<<1, 128>>>(p);
  if (!std::strcmp(which, "uninitialised")) uninitialised<<<1, 32>>>(p);
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("%s: %s\n", which, cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 3;
}
