#include "kernels/gpu/launcher/launcher.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>

namespace fwl::gpu {
namespace {

// From cuda.h: CUfunction_attribute. Kernels that use more than 48 KiB of shared memory must set
// it.
constexpr int kMaxDynamicSharedBytes = 8;
constexpr unsigned kDefaultSharedBytes = 48 << 10;

constexpr size_t kParameters = static_cast<size_t>(Parameter::kCount);

// The kernels that were loaded. They stay loaded until the process ends: they serve every context,
// and unloading them while the driver shuts down is an error.
class Kernels {
public:
  // Returns a kernel, after loading it and raising its limit of shared memory on the device if
  // needed.
  DriverKernel get(const Driver& driver, const Variant& variant, bool ptx, Device device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto place = kernels_.find({&variant, ptx});
    if (place == kernels_.end()) {
      place = kernels_.emplace(Key{&variant, ptx}, load(driver, variant, ptx)).first;
    }
    if (variant.shared_bytes > kDefaultSharedBytes) {
      bool& granted = granted_[{place->second, device}];
      if (!granted) {
        driver.check(driver.cuKernelSetAttribute(kMaxDynamicSharedBytes,
                                                 static_cast<int>(variant.shared_bytes),
                                                 place->second, device),
                     "cuKernelSetAttribute");
        granted = true;
      }
    }
    return place->second;
  }

private:
  using Key = std::pair<const Variant*, bool>;

  static DriverKernel load(const Driver& driver, const Variant& variant, bool ptx) {
    const Image& image = ptx ? variant.ptx : variant.cubin;
    Library library = nullptr;
    driver.check(driver.cuLibraryLoadData(&library, fwl_gpu_images + image.offset, nullptr, nullptr,
                                          0, nullptr, nullptr, 0),
                 "cuLibraryLoadData");
    DriverKernel kernel = nullptr;
    const Result found = driver.cuLibraryGetKernel(&kernel, library, variant.symbol);
    if (found != 0) {
      driver.cuLibraryUnload(library);
    }
    driver.check(found, "cuLibraryGetKernel");
    return kernel;
  }

  std::mutex mutex_;
  std::map<Key, DriverKernel> kernels_;
  std::map<std::pair<DriverKernel, Device>, bool> granted_;
};

Kernels& kernels() {
  static Kernels& all = *new Kernels; // never destroyed: threads may still launch at exit
  return all;
}

// The GPU that a call runs on, and the kernels that it uses.
struct Place {
  const Driver& driver;
  Device device;
  Target target;
};

Place current_place() {
  const Driver& here = driver();
  const Device device = current_device(here);
  const int sm = compute_capability(here, device);
  const Target target = target_of(sm);
  if (target.sm == 0) {
    throw DriverError("there are no kernels for this GPU: its compute capability is " +
                      std::to_string(sm / 10) + "." + std::to_string(sm % 10) +
                      ", and they need 7.5 or more");
  }
  return {here, device, target};
}

bool all_aligned(const Tensors& tensors) {
  const void* const all[] = {tensors.query, tensors.key,    tensors.value,  tensors.decay,
                             tensors.past,  tensors.output, tensors.present};
  return std::all_of(std::begin(all), std::end(all), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

void launch_plan(const Place& place, const Plan& plan, const Tensors& tensors, void* workspace,
                 Stream stream) {
  std::array<const void*, kParameters> pointers{};
  const auto pointer = [&](Parameter parameter) -> const void*& {
    return pointers[static_cast<size_t>(parameter)];
  };
  pointer(Parameter::kQuery) = tensors.query;
  pointer(Parameter::kKey) = tensors.key;
  pointer(Parameter::kValue) = tensors.value;
  pointer(Parameter::kDecay) = tensors.decay;
  pointer(Parameter::kPresent) = tensors.present;
  pointer(Parameter::kOutput) = tensors.output;
  pointer(Parameter::kPartial) = workspace;
  void* null = nullptr;
  for (const Launch& each : plan.launches) {
    pointer(Parameter::kPast) = each.first_segment ? tensors.past : tensors.present;
    const Variant& variant = *each.variant;
    std::vector<void*> arguments;
    for (const Parameter parameter : signatures[static_cast<size_t>(variant.kernel)]) {
      const size_t index = static_cast<size_t>(parameter);
      arguments.push_back(parameter < kFirstSize ? static_cast<void*>(&pointers[index])
                                                 : const_cast<int32_t*>(&each.scalars[index]));
    }
    arguments.insert(arguments.end(), variant.null_parameters, &null);
    const Driver& driver = place.driver;
    DriverKernel kernel = kernels().get(driver, variant, place.target.ptx, place.device);
    driver.check(driver.cuLaunchKernel(kernel, static_cast<unsigned>(each.grid), 1, 1,
                                       variant.threads, 1, 1, variant.shared_bytes, stream,
                                       arguments.data(), nullptr),
                 "cuLaunchKernel");
  }
}

} // namespace

void prepare(const Sizes& sizes) {
  const Place place = current_place();
  for (const bool aligned : {true, false}) {
    for (const Launch& each : make_plan(sizes, place.target.sm, aligned).launches) {
      void* function = nullptr; // getting it loads the code into the current context
      DriverKernel kernel =
          kernels().get(place.driver, *each.variant, place.target.ptx, place.device);
      place.driver.check(place.driver.cuKernelGetFunction(&function, kernel),
                         "cuKernelGetFunction");
    }
  }
}

void launch(const Sizes& sizes, const Tensors& tensors, void* workspace, Stream stream) {
  const Place place = current_place();
  launch_plan(place, make_plan(sizes, place.target.sm, all_aligned(tensors)), tensors, workspace,
              stream);
}

void launch(const Sizes& sizes, const Tensors& tensors, Stream stream) {
  const Place place = current_place();
  const Plan plan = make_plan(sizes, place.target.sm, all_aligned(tensors));
  DevicePointer workspace = 0;
  if (plan.workspace_bytes > 0) {
    place.driver.check(place.driver.cuMemAllocAsync(&workspace, plan.workspace_bytes, stream),
                       "cuMemAllocAsync");
  }
  const auto free_workspace = [&] {
    return workspace == 0 ? 0 : place.driver.cuMemFreeAsync(workspace, stream);
  };
  try {
    launch_plan(place, plan, tensors, reinterpret_cast<void*>(workspace), stream);
  } catch (...) {
    free_workspace();
    throw;
  }
  place.driver.check(free_workspace(), "cuMemFreeAsync");
}

} // namespace fwl::gpu
