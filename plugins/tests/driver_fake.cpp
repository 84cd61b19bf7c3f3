#include "driver_fake.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace fwl::fake {
namespace {

using gpu::Activation;
using gpu::Kernel;
using gpu::Variant;

constexpr int kInvalidValue = 1;
constexpr int kNotFound = 500;
constexpr int kInjected = 999;
constexpr unsigned kDefaultSharedBytes = 48 << 10;

struct Loaded {
  const Variant* variant;
  bool ptx;
};

// Takes the arguments of a launch one after the other.
class Arguments {
public:
  explicit Arguments(void** parameters) : next_(parameters) {}

  template <class Value> Value take() {
    Value value;
    std::memcpy(&value, *next_++, sizeof(value));
    return value;
  }
  float* floats() { return take<float*>(); }
  int64_t size() { return take<int32_t>(); }

private:
  void** next_;
};

int64_t tiles(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

void require(bool holds, const char* what) {
  if (!holds) {
    throw std::runtime_error(what);
  }
}

// Activations, as float32.
struct Elements {
  const void* data;
  Activation activation;

  float operator[](int64_t i) const { return to_float(data, static_cast<size_t>(i), activation); }
};

void decode(const Variant& variant, unsigned grid, Arguments a) {
  const auto elements = [&] { return Elements{a.take<void*>(), variant.activation}; };
  const Elements query = elements(), key = elements(), value = elements();
  const float *decay = a.floats(), *past = a.floats();
  float* const present = a.floats();
  float *const output = a.floats(), *const partial = a.floats();
  const int64_t size_k = a.size(), size_v = a.size(), splits = a.size(), lines = a.size();
  const int64_t tiles_v = tiles(size_v, variant.block_v);
  require(grid % (tiles_v * splits) == 0, "decode: grid");
  require(variant.split == (splits > 1), "decode: splits");
  require(splits * lines >= size_k && lines % variant.block_k == 0, "decode: rows");
  const int64_t batch = grid / (tiles_v * splits);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t share = 0; share < splits; ++share) {
      for (int64_t v = 0; v < size_v; ++v) {
        double total = 0;
        for (int64_t k = share * lines; k < std::min(size_k, (share + 1) * lines); ++k) {
          const int64_t place = (b * size_k + k) * size_v + v;
          present[place] = decay[b] * past[place] + key[b * size_k + k] * value[b * size_v + v];
          total += static_cast<double>(query[b * size_k + k]) * present[place];
        }
        if (variant.split) {
          partial[(b * splits + share) * size_v + v] = static_cast<float>(total);
        } else {
          output[b * size_v + v] = static_cast<float>(total);
        }
      }
    }
  }
}

void sum_partials(const Variant& variant, unsigned grid, Arguments a) {
  const float* const partial = a.floats();
  float* const output = a.floats();
  const int64_t size_v = a.size(), splits = a.size();
  const int64_t batch = grid / tiles(size_v, variant.block_v);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t v = 0; v < size_v; ++v) {
      double total = 0;
      for (int64_t share = 0; share < splits; ++share) {
        total += partial[(b * splits + share) * size_v + v];
      }
      output[b * size_v + v] = static_cast<float>(total);
    }
  }
}

void prefill_state(const Variant& variant, unsigned grid, Arguments a) {
  const auto elements = [&] { return Elements{a.take<void*>(), variant.activation}; };
  const Elements query = elements(), key = elements(), value = elements();
  const float *decay = a.floats(), *past = a.floats();
  float *const present = a.floats(), *const partial = a.floats();
  const int64_t rows = a.size(), tokens = a.size(), start = a.size(), length = a.size();
  const int64_t size_k = a.size(), size_v = a.size();
  const int64_t tiles_k = tiles(size_k, variant.block_k);
  require(grid == tiles_k * rows * tiles(size_v, variant.block_v), "prefill_state: grid");
  std::vector<double> read(static_cast<size_t>(size_v));
  for (int64_t tile = 0; tile < tiles_k; ++tile) {
    const int64_t first = tile * variant.block_k;
    const int64_t last = std::min(size_k, first + variant.block_k);
    for (int64_t b = 0; b < rows; ++b) {
      float* const state = present + b * size_k * size_v;
      std::memmove(state + first * size_v, past + (b * size_k + first) * size_v,
                   sizeof(float) * static_cast<size_t>((last - first) * size_v));
      for (int64_t chunk = 0; chunk < length; chunk += variant.chunk) {
        const int64_t end = std::min(length, chunk + variant.chunk);
        double fade = 1;
        for (int64_t t = chunk; t < end; ++t) {
          const int64_t token = b * tokens + start + t;
          fade *= decay[token];
          std::fill(read.begin(), read.end(), 0.0);
          for (int64_t k = first; k < last; ++k) {
            const double q = query[token * size_k + k];
            for (int64_t v = 0; v < size_v; ++v) {
              read[static_cast<size_t>(v)] += q * state[k * size_v + v];
            }
          }
          for (int64_t v = 0; v < size_v; ++v) {
            partial[((tile * rows + b) * length + t) * size_v + v] =
                static_cast<float>(fade * read[static_cast<size_t>(v)]);
          }
        }
        for (int64_t t = chunk; t < end; ++t) {
          const int64_t token = b * tokens + start + t;
          for (int64_t k = first; k < last; ++k) {
            const float written = key[token * size_k + k];
            for (int64_t v = 0; v < size_v; ++v) {
              float& cell = state[k * size_v + v];
              cell = decay[token] * cell + written * value[token * size_v + v];
            }
          }
        }
      }
    }
  }
}

void prefill_output(const Variant& variant, unsigned grid, Arguments a) {
  const auto elements = [&] { return Elements{a.take<void*>(), variant.activation}; };
  const Elements query = elements(), key = elements(), value = elements();
  const float *decay = a.floats(), *partial = a.floats();
  float* const output = a.floats();
  const int64_t rows = a.size(), tokens = a.size(), start = a.size(), length = a.size();
  const int64_t tiles_k = a.size(), size_k = a.size(), size_v = a.size();
  require(grid == rows * tiles(length, variant.chunk) * tiles(size_v, variant.block_v),
          "prefill_output: grid");
  std::vector<double> total(static_cast<size_t>(size_v));
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = b * tokens + start + t;
      std::fill(total.begin(), total.end(), 0.0);
      double fade = 1; // decay of the update of token s
      for (int64_t s = t; s >= t / variant.chunk * variant.chunk; --s) {
        const int64_t other = b * tokens + start + s;
        double score = 0;
        for (int64_t k = 0; k < size_k; ++k) {
          score += static_cast<double>(query[token * size_k + k]) * key[other * size_k + k];
        }
        for (int64_t v = 0; v < size_v; ++v) {
          total[static_cast<size_t>(v)] += fade * score * value[other * size_v + v];
        }
        fade *= decay[other];
      }
      for (int64_t v = 0; v < size_v; ++v) {
        for (int64_t tile = 0; tile < tiles_k; ++tile) {
          total[static_cast<size_t>(v)] += partial[((tile * rows + b) * length + t) * size_v + v];
        }
        output[token * size_v + v] = static_cast<float>(total[static_cast<size_t>(v)]);
      }
    }
  }
}

void compute(const Variant& variant, unsigned grid, void** parameters) {
  const Arguments arguments(parameters);
  switch (variant.kernel) {
  case Kernel::kDecode:
    return decode(variant, grid, arguments);
  case Kernel::kSumPartials:
    return sum_partials(variant, grid, arguments);
  case Kernel::kPrefillState:
    return prefill_state(variant, grid, arguments);
  case Kernel::kPrefillOutput:
    return prefill_output(variant, grid, arguments);
  case Kernel::kCount:
    break;
  }
  throw std::runtime_error("no such kernel");
}

bool fails(const char* function) {
  return driver().failing == function;
}

} // namespace

Driver& driver() {
  static Driver instance;
  return instance;
}

size_t bytes_of(Activation activation) {
  return activation == Activation::kFloat32 ? 4 : 2;
}

float to_float(const void* data, size_t index, Activation activation) {
  if (activation == Activation::kFloat32) {
    return static_cast<const float*>(data)[index];
  }
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (activation == Activation::kBFloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? std::nanf("") : INFINITY)
                          : exponent
                              ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

void from_float(void* data, size_t index, Activation activation, float value) {
  if (activation == Activation::kFloat32) {
    static_cast<float*>(data)[index] = value;
    return;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  uint16_t bits;
  if (activation == Activation::kBFloat16) {
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  } else {
    const float magnitude = std::fabs(value);
    const int exponent = magnitude > 0 ? std::max(-14, std::ilogb(magnitude)) : -14;
    // Rounds half to even; a carry runs into the exponent, as it should.
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    bits = static_cast<uint16_t>((wide >> 16 & 0x8000) | ((exponent + 14) * 1024 + fraction));
  }
  static_cast<uint16_t*>(data)[index] = bits;
}

} // namespace fwl::fake

using namespace fwl::fake;

namespace {

// Makes calls of several threads run one after the other, so that the thread sanitizer reports
// races of the callers only.
std::mutex one_at_a_time;
using Turn = std::lock_guard<std::mutex>;

} // namespace

extern "C" {

int cuGetErrorName(int error, const char** name) {
  *name = error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE"
          : error == kNotFound   ? "CUDA_ERROR_NOT_FOUND"
          : error == kInjected   ? "CUDA_ERROR_UNKNOWN"
                                 : nullptr;
  return 0;
}

int cuCtxGetDevice(int* device) {
  const Turn turn(one_at_a_time);
  *device = 0;
  return fails("cuCtxGetDevice") ? kInjected : 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const Turn turn(one_at_a_time);
  if (attribute != 75 && attribute != 76) {
    return kInvalidValue;
  }
  *value = attribute == 75 ? driver().sm / 10 : driver().sm % 10;
  return 0;
}

int cuLibraryLoadData(void** library, const void* code, const int*, void**, unsigned, const int*,
                      void**, unsigned) {
  const Turn turn(one_at_a_time);
  if (fails("cuLibraryLoadData")) {
    return kInjected;
  }
  const size_t offset =
      static_cast<size_t>(static_cast<const unsigned char*>(code) - driver().images);
  for (const fwl::gpu::Variant& each : fwl::gpu::variants) {
    const bool cubin = each.cubin.offset == offset && std::memcmp(code, "\177ELF", 4) == 0;
    const bool ptx = each.ptx.bytes > 0 && each.ptx.offset == offset &&
                     std::strstr(static_cast<const char*>(code), ".target sm_") != nullptr;
    if (cubin || ptx) {
      *library = new Loaded{&each, ptx};
      ++driver().loaded;
      return 0;
    }
  }
  return kInvalidValue;
}

int cuLibraryUnload(void* library) {
  const Turn turn(one_at_a_time);
  delete static_cast<Loaded*>(library);
  --driver().loaded;
  return 0;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  const Turn turn(one_at_a_time);
  const Loaded& loaded = *static_cast<Loaded*>(library);
  if (fails("cuLibraryGetKernel") || std::strcmp(name, loaded.variant->symbol) != 0) {
    return kNotFound;
  }
  *kernel = library; // each library has one kernel
  return 0;
}

int cuKernelGetFunction(void** function, void* kernel) {
  const Turn turn(one_at_a_time);
  *function = kernel;
  ++driver().prepared;
  return fails("cuKernelGetFunction") ? kInjected : 0;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  const Turn turn(one_at_a_time);
  if (attribute != 8 || fails("cuKernelSetAttribute")) {
    return kInvalidValue;
  }
  driver().shared_bytes_granted[kernel] = value;
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** parameters, void** extra) {
  const Turn turn(one_at_a_time);
  if (fails("cuLaunchKernel")) {
    return kInjected;
  }
  const Loaded& loaded = *static_cast<Loaded*>(function);
  const Variant& variant = *loaded.variant;
  const auto granted = driver().shared_bytes_granted.find(function);
  const bool memory = shared_bytes <= kDefaultSharedBytes ||
                      (granted != driver().shared_bytes_granted.end() &&
                       static_cast<unsigned>(granted->second) >= shared_bytes);
  if (!memory || grid_x == 0 || grid_y != 1 || grid_z != 1 || block_x != variant.threads ||
      block_y != 1 || block_z != 1 || extra != nullptr) {
    return kInvalidValue;
  }
  const size_t arguments = fwl::gpu::signatures[static_cast<size_t>(variant.kernel)].size();
  for (size_t i = 0; i < variant.null_parameters; ++i) {
    void* scratch;
    std::memcpy(&scratch, parameters[arguments + i], sizeof(scratch));
    if (scratch != nullptr) {
      return kInvalidValue;
    }
  }
  driver().launched.push_back({&variant, loaded.ptx, grid_x, block_x, shared_bytes, stream});
  try {
    compute(variant, grid_x, parameters);
  } catch (const std::exception&) {
    return kInvalidValue;
  }
  return 0;
}

int cuMemAllocAsync(unsigned long long* pointer, size_t bytes, void*) {
  const Turn turn(one_at_a_time);
  if (fails("cuMemAllocAsync")) {
    return kInjected;
  }
  std::vector<char> memory(bytes, '\xff'); // NaN, whatever the type
  *pointer = reinterpret_cast<uintptr_t>(memory.data());
  driver().allocated[*pointer] = std::move(memory);
  return 0;
}

int cuMemFreeAsync(unsigned long long pointer, void*) {
  const Turn turn(one_at_a_time);
  return driver().allocated.erase(pointer) == 1 ? 0 : kInvalidValue;
}

} // extern "C"
