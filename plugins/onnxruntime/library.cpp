// Entry point of libfwl_ort, which ONNX Runtime calls when the library is registered with a
// session.

#include <atomic>
#include <string>

#include "onnxruntime/operator.h"
#include "op_spec.h"

namespace {

// One domain for all sessions. It is never released, because ONNX Runtime keeps pointers to it and
// unloads the library only after its own objects are gone.
std::atomic<OrtCustomOpDomain*> shared_domain{nullptr};

// Returns the domain with the op, after creating it at the first call.
OrtStatus* domain_of(const OrtApi& api, OrtCustomOpDomain** domain) {
  *domain = shared_domain.load();
  if (*domain != nullptr) {
    return nullptr;
  }
  OrtCustomOpDomain* created = nullptr;
  OrtStatus* status = api.CreateCustomOpDomain(fwl::op::kDomain, &created);
  for (const OrtCustomOp* each : fwl::ort::custom_ops(api)) {
    if (status == nullptr) {
      status = api.CustomOpDomain_Add(created, each);
    }
  }
  if (status != nullptr) {
    if (created != nullptr) {
      api.ReleaseCustomOpDomain(created);
    }
    return status;
  }
  if (!shared_domain.compare_exchange_strong(*domain, created)) {
    api.ReleaseCustomOpDomain(created); // another thread was first
    return nullptr;
  }
  *domain = created;
  return nullptr;
}

// The oldest version of the interface; enough to create a status.
constexpr uint32_t kOldestApiVersion = 1;

} // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus*
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(fwl::ort::kApiVersion);
  if (api == nullptr) {
    const OrtApi* old = base->GetApi(kOldestApiVersion);
    if (old == nullptr) {
      return nullptr; // there is no way to report an error
    }
    static thread_local char message[160];
    const char* found = base->GetVersionString();
    const char* parts[] = {"libfwl_ort needs ONNX Runtime 1.17 or newer; this is ", found,
                           ". Upgrade it, or run without the plugin."};
    size_t at = 0;
    for (const char* part : parts) {
      while (*part != '\0' && at + 1 < sizeof(message)) {
        message[at++] = *part++;
      }
    }
    message[at] = '\0';
    return old->CreateStatus(ORT_NOT_IMPLEMENTED, message);
  }
  OrtCustomOpDomain* domain = nullptr;
  OrtStatus* status = domain_of(*api, &domain);
  return status != nullptr ? status : api->AddCustomOpDomain(options, domain);
}
