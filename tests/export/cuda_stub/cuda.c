/* A CUDA device made of host memory, for tests on machines without a GPU: what TVM's CUDA runtime needs of the driver and of the runtime
   library. A launch is handed to a function that the test sets; device pointers are host pointers. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Launch;

typedef void (*Handler)(const char *name, const unsigned *sizes, void **arguments);

enum { MOST = 65536 };
static struct { char *at; size_t size; } blocks[MOST];
static int used;
static Handler handler;
static int modules;

void stub_handle(Handler h) { handler = h; }
int stub_modules(void) { return modules; }

/* bytes from p to the end of the allocation that it points into; 0: into none */
size_t stub_remaining(char *p) {
  for (int i = 0; i < used; ++i)
    if (blocks[i].at && p >= blocks[i].at && p < blocks[i].at + blocks[i].size) return blocks[i].size - (size_t)(p - blocks[i].at);
  return 0;
}

int cuDeviceGetName(char *name, int length, int device) { (void)device; snprintf(name, (size_t)length, "host memory"); return 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) { (void)f; (void)attribute; (void)value; return 0; }
int cuGetErrorName(int e, const char **text) { (void)e; *text = "stub"; return 0; }
int cuGetErrorString(int e, const char **text) { (void)e; *text = "stub"; return 0; }
int cuModuleLoadData(void **module, const void *image) { (void)image; ++modules; *module = malloc(1); return 0; }
int cuModuleUnload(void *module) { free(module); return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { (void)module; *f = strdup(name); return 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuLaunchKernelEx(const Launch *l, void *f, void **arguments, void **extra) {
  unsigned sizes[7] = {l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1], l->block[2], l->shared};
  (void)extra;
  handler(f, sizes, arguments);
  return 0;
}

int cudaMalloc(void **p, size_t size) {
  if (used == MOST) return 2;
  *p = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(*p, 0xA5, size); /* what nobody wrote is not zero */
  blocks[used].at = *p;
  blocks[used++].size = size;
  return 0;
}
int cudaFree(void *p) {
  for (int i = 0; i < used; ++i)
    if (blocks[i].at == p) blocks[i].at = NULL;
  free(p);
  return 0;
}
int cudaMallocHost(void **p, size_t size) { *p = malloc(size); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemGetInfo(size_t *unused, size_t *total) { *unused = *total = (size_t)1 << 32; return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { (void)kind; (void)stream; memcpy(to, from, size); return 0; }
int cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, void *stream) { (void)a; (void)b; (void)stream; memcpy(to, from, size); return 0; }
int cudaSetDevice(int device) { (void)device; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDeviceProperties(char *name, int device) { (void)device; strcpy(name, "host memory"); return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 10 ? 32 : 1024; /* compute capability, warp, threads */
  return 0;
}
const char *cudaGetErrorName(int e) { (void)e; return "stub"; }
const char *cudaGetErrorString(int e) { (void)e; return "stub"; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaEventCreate(void **e) { *e = malloc(1); return 0; }
int cudaEventDestroy(void *e) { free(e); return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { (void)a; (void)b; *ms = 1.0f; return 0; }
int cudaEventRecord(void *e, void *stream) { (void)e; (void)stream; return 0; }
int cudaEventSynchronize(void *e) { (void)e; return 0; }
int cudaStreamCreate(void **s) { *s = NULL; return 0; }
int cudaStreamCreateWithFlags(void **s, unsigned flags) { (void)flags; *s = NULL; return 0; }
int cudaStreamDestroy(void *s) { (void)s; return 0; }
int cudaStreamSynchronize(void *s) { (void)s; return 0; }
int cudaStreamWaitEvent(void *s, void *e, unsigned flags) { (void)s; (void)e; (void)flags; return 0; }
int cudaStreamBeginCapture(void *s, int mode) { (void)s; (void)mode; return 1; }
int cudaStreamEndCapture(void *s, void **graph) { (void)s; (void)graph; return 1; }
int cudaGraphDestroy(void *g) { (void)g; return 0; }
int cudaGraphExecDestroy(void *g) { (void)g; return 0; }
int cudaGraphInstantiate(void **e, void *g, unsigned long long flags) { (void)e; (void)g; (void)flags; return 1; }
int cudaGraphLaunch(void *e, void *s) { (void)e; (void)s; return 1; }
