// The scheduler behind include/cuda_runtime.h: one fiber per CUDA thread, blocks one after another.
#include <cuda_runtime.h>

#include <link.h>
#include <ucontext.h>

#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ivfast {
constexpr size_t kShared = 232448;  // the most bytes that a block may have on any device: 227 KiB on sm_90 and sm_100
constexpr size_t kGuard = 4096;
alignas(16) thread_local float4 dynamic_shared[(kShared + kGuard) / sizeof(float4)];
}  // namespace ivfast

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned char kPoison = 0xFF;  // bytes of a NaN in every floating type, of -1 in every signed one

enum class State { ready, barrier, warp, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  State state;
  Site site;
  Op op;  // and what it contributes to the other lanes while state is warp
  unsigned mask;
  uint64_t bits;
  int source;
  uint64_t reply;
};

std::vector<std::unique_ptr<Thread>> threads;  // grows to the largest block seen; stacks are kept
std::vector<int> ready;
int count, current;
ucontext_t scheduler;
const std::function<void()>* body;
std::exception_ptr failure;
std::mt19937_64 random_source(0);
std::map<const void*, size_t> opted_in;
size_t shared_limit = 166912;  // bytes that a block may have; by default those of sm_80

std::string where(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

void suspend(State state, Site site) {
  Thread& self = *threads[current];
  self.state = state;
  self.site = site;
  swapcontext(&self.context, &scheduler);
}

void fiber_main() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  suspend(State::done, {});
}

// Poisons every __shared__ variable; together they are the thread-local storage of this library.
int poison_module(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<ElfW(Addr)>(&poison_module);
  bool mine = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const ElfW(Addr) begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && begin <= here && here < begin + segment.p_memsz) mine = true;
    if (segment.p_type == PT_TLS) size = segment.p_memsz;
  }
  if (!mine) return 0;
  std::memset(info->dlpi_tls_data, kPoison, size);
  return 1;
}

void poison_shared() {
  ivfast::dynamic_shared[0].x = 0;  // allocates the storage
  if (!dl_iterate_phdr(poison_module, nullptr)) throw std::runtime_error("simt: found no shared memory to poison");
}

void wake(int thread) {
  threads[thread]->state = State::ready;
  ready.push_back(thread);
}

// Completes the warp operation in which `thread` waits, once every lane of its mask has reached it.
void try_warp(int thread) {
  const Thread& first = *threads[thread];
  const int warp = thread / 32 * 32;
  uint64_t votes = 0, least = first.bits;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (warp + lane >= count) return;
    const Thread& other = *threads[warp + lane];
    if (other.state != State::warp || other.op != first.op || other.mask != first.mask) return;
    votes |= (other.bits & 1) << lane;
    least = std::min(least, other.bits);
  }
  const unsigned mask = first.mask;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& self = *threads[warp + lane];
    if (self.op == Op::shuffle && !(mask >> self.source & 1)) {
      throw std::runtime_error("simt: shuffle at " + where(self.site) + " reads a lane outside its mask");
    }
    self.reply = self.op == Op::shuffle ? threads[warp + self.source]->bits : self.op == Op::least ? least : votes;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) wake(warp + lane);
  }
}

[[noreturn]] void report_disagreement() {
  std::map<std::string, int> groups;
  for (int i = 0; i < count; ++i) {
    const Thread& thread = *threads[i];
    const char* kind = thread.state == State::barrier ? "at the barrier " : "in the warp operation ";
    ++groups[thread.state == State::done ? "finished" : kind + where(thread.site)];
  }
  std::string message = "simt: the " + std::to_string(count) + " threads of a block disagree:";
  for (const auto& [place, threads_there] : groups) message += " " + std::to_string(threads_there) + " " + place + ";";
  message.back() = '.';
  throw std::runtime_error(message);
}

// No fiber can run: the end of the block, a barrier that all have reached, or an error. True at the end.
bool finish_or_release() {
  const Thread& first = *threads[0];
  for (int i = 0; i < count; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state != first.state || thread.state == State::warp) report_disagreement();
    if (thread.state == State::barrier && !same(thread.site, first.site)) report_disagreement();
  }
  if (first.state == State::done) return true;
  for (int i = 0; i < count; ++i) wake(i);
  return false;
}

void run_block(size_t shared) {
  poison_shared();
  ready.clear();
  for (int i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber_main, 0);
    wake(i);
  }
  // half of the blocks run the fiber that woke last, so that some warps run far ahead of others
  const bool ahead = random_source() & 1;
  if (ahead) std::shuffle(ready.begin(), ready.end(), random_source);
  for (;;) {
    if (ready.empty()) {
      if (finish_or_release()) break;
      if (ahead) std::shuffle(ready.begin(), ready.end(), random_source);
    }
    if (!ahead) std::swap(ready[random_source() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
    threadIdx = threads[current]->index;
    swapcontext(&scheduler, &threads[current]->context);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    if (threads[current]->state == State::warp) try_warp(current);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(ivfast::dynamic_shared);
  for (size_t i = shared; i < shared + ivfast::kGuard; ++i) {
    if (bytes[i] != kPoison) throw std::runtime_error("simt: a block wrote past its dynamic shared memory");
  }
}

}  // namespace

int lane() { return current % 32; }

void block_barrier(Site site) { suspend(State::barrier, site); }

uint64_t warp_op(Op op, unsigned mask, uint64_t bits, int source, Site site) {
  Thread& self = *threads[current];
  if (!(mask >> lane() & 1)) throw std::runtime_error("simt: a thread outside the mask executes " + where(site));
  self.op = op;
  self.mask = mask;
  self.bits = bits;
  self.source = source;
  suspend(State::warp, site);
  return self.reply;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& kernel_body) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, size = uint64_t{block.x} * block.y * block.z;
  if (!blocks || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (!size || size > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  const auto limit = opted_in.find(kernel);
  if (config.dynamicSmemBytes > (limit == opted_in.end() ? 48 << 10 : limit->second)) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > shared_limit) return cudaErrorInvalidValue;

  count = static_cast<int>(size);
  body = &kernel_body;
  gridDim = grid;
  blockDim = block;
  while (threads.size() < size) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->stack.reset(new char[kStack]);
  }
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_source);
  for (const uint64_t i : order) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(config.dynamicSmemBytes);
  }
  return cudaSuccess;
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "invalid argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(simt::shared_limit);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > simt::shared_limit) return cudaErrorInvalidValue;
  simt::opted_in[kernel] = value;
  return cudaSuccess;
}

// Sets the bytes of shared memory that a block may have.
extern "C" __attribute__((visibility("default"))) void simt_shared(uint64_t bytes) {
  simt::shared_limit = std::min<size_t>(bytes, ivfast::kShared);
}

// Sets the order of threads and blocks in the following launches.
extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) { simt::random_source.seed(seed); }
