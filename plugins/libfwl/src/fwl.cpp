#include "fwl/fwl.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "error.h"
#include "session.h"

struct fwl_model {
  std::shared_ptr<const fwl::internal::Model> model;
};

struct fwl_session {
  fwl::internal::Session session;
};

namespace {

using fwl::internal::Failure;

constexpr char kVersion[] = FWL_VERSION;

fwl_status report(fwl_error* error, fwl_status status, const char* message) noexcept {
  if (error != nullptr) {
    error->status = status;
    size_t size = std::min(std::strlen(message), sizeof(error->message) - 1);
    while (size > 0 && (message[size] & 0xc0) == 0x80) {
      --size; // do not cut a UTF-8 character in two
    }
    std::memcpy(error->message, message, size);
    error->message[size] = '\0';
  }
  return status;
}

// Runs a function that may throw, and turns whatever it throws into a status.
template <class Function> fwl_status guarded(fwl_error* error, const Function& function) noexcept {
  try {
    function();
    return report(error, FWL_OK, "");
  } catch (const Failure& failure) {
    return report(error, failure.status(), failure.what());
  } catch (const std::bad_alloc&) {
    return report(error, FWL_ERROR_MEMORY, "there is not enough memory; no row has moved");
  } catch (const std::exception& other) {
    return report(error, FWL_ERROR_INTERNAL, other.what());
  } catch (...) {
    return report(error, FWL_ERROR_INTERNAL,
                  "an unknown C++ exception was thrown; this is a bug in libfwl");
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw Failure(FWL_ERROR_ARGUMENT, std::string(name) + " is NULL");
  }
}

// Sizes of the structures in the first version of fwl.h, up to and including their last field then.
constexpr size_t kOldestOptions = offsetof(fwl_options, threads) + sizeof(int32_t);
constexpr size_t kOldestInfo = offsetof(fwl_info, precision) + sizeof(fwl_info::precision);

std::shared_ptr<const fwl::internal::Runtime> open_runtime(const fwl::internal::Bundle& bundle,
                                                           const fwl_options& chosen) {
  const std::string name = chosen.backend != nullptr ? chosen.backend : "";
  if (name != "auto" && name != "tensorrt" && name != "onnxruntime") {
    throw Failure(FWL_ERROR_ARGUMENT,
                  "backend '" + name + "' is unknown; expected onnxruntime, tensorrt or auto");
  }
  std::string without;
  if (name != "onnxruntime") {
    try {
      return fwl::internal::open_tensorrt(bundle,
                                          {chosen.tensorrt_library, chosen.tensorrt_plugin,
                                           chosen.device, chosen.allow_embedded_plugin != 0});
    } catch (const fwl::internal::Absent& absent) {
      if (name == "tensorrt") {
        throw;
      }
      without = std::string(". TensorRT was tried first: ") + absent.what();
    }
  }
  try {
    return fwl::internal::open_onnxruntime(bundle, chosen.runtime_library, chosen.plugin,
                                           chosen.threads);
  } catch (const Failure& failure) {
    throw Failure(failure.status(), failure.what() + without);
  }
}

} // namespace

extern "C" {

uint32_t fwl_abi_version(void) {
  return FWL_ABI_VERSION;
}

const char* fwl_version(void) {
  return kVersion;
}

void fwl_options_init(fwl_options* options, size_t size) {
  if (options != nullptr) {
    fwl_options all{};
    all.size = size;
    all.backend = "onnxruntime";
    std::memset(static_cast<void*>(options), 0, size);
    std::memcpy(static_cast<void*>(options), &all, std::min(size, sizeof(all)));
  }
}

fwl_status fwl_model_open(const char* bundle, const fwl_options* options, fwl_model** model,
                          fwl_error* error) {
  return guarded(error, [&] {
    require(model, "model");
    *model = nullptr;
    require(bundle, "bundle");
    fwl_options chosen;
    fwl_options_init(&chosen, sizeof(chosen));
    if (options != nullptr) {
      if (options->size < kOldestOptions || options->size > sizeof(chosen)) {
        throw Failure(FWL_ERROR_ARGUMENT, "options->size is " + std::to_string(options->size) +
                                              ", which no version of fwl_options has; call "
                                              "fwl_options_init first");
      }
      std::memcpy(static_cast<void*>(&chosen), options, options->size);
    }
    const fwl::internal::Limits limits = fwl::internal::limits_of(
        chosen.max_learning_weight, chosen.max_update_norm, chosen.clip_update_norm);
    auto made = std::make_shared<fwl::internal::Model>();
    made->bundle = fwl::internal::read_bundle(bundle);
    made->runtime = open_runtime(made->bundle, chosen);
    made->limits = limits;
    *model = new fwl_model{std::move(made)};
  });
}

fwl_status fwl_model_info(const fwl_model* model, fwl_info* info, fwl_error* error) {
  return guarded(error, [&] {
    require(model, "model");
    require(info, "info");
    if (info->size < kOldestInfo) {
      throw Failure(FWL_ERROR_ARGUMENT, "info->size is " + std::to_string(info->size) +
                                            "; set it to sizeof(fwl_info) first");
    }
    const fwl::internal::Bundle& bundle = model->model->bundle;
    fwl_info all{};
    all.size = info->size;
    all.vocab_size = bundle.vocab_size;
    all.max_tokens = bundle.max_tokens;
    all.anchor_interval = bundle.anchor_interval;
    all.state_bytes = bundle.state_bytes();
    bundle.model_id.copy(all.model_id, sizeof(all.model_id) - 1);
    bundle.precision.copy(all.precision, sizeof(all.precision) - 1);
    std::string(model->model->runtime->name()).copy(all.backend, sizeof(all.backend) - 1);
    model->model->runtime->engine().copy(all.engine, sizeof(all.engine) - 1);
    std::memcpy(static_cast<void*>(info), &all, std::min(info->size, sizeof(all)));
  });
}

void fwl_model_close(fwl_model* model) {
  delete model;
}

fwl_status fwl_session_open(fwl_model* model, size_t rows, fwl_session** session,
                            fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    *session = nullptr;
    require(model, "model");
    *session = new fwl_session{{model->model, rows}};
  });
}

void fwl_session_close(fwl_session* session) {
  delete session;
}

fwl_status fwl_session_feed(fwl_session* session, const int64_t* tokens, size_t count,
                            const float* label_weights, const int64_t* lengths, fwl_logits which,
                            float* logits, size_t logits_size, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.feed(tokens, count, label_weights, lengths, which, logits, logits_size);
  });
}

fwl_status fwl_session_positions(fwl_session* session, int64_t* positions, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    require(positions, "positions");
    const std::vector<int64_t> found = session->session.positions();
    std::copy(found.begin(), found.end(), positions);
  });
}

fwl_status fwl_session_set_learning_rate_scale(fwl_session* session, const float* scale,
                                               fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.set_learning_rate_scale(scale);
  });
}

fwl_status fwl_session_learned(fwl_session* session, double* norms, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    require(norms, "norms");
    const std::vector<double> found = session->session.learned();
    std::copy(found.begin(), found.end(), norms);
  });
}

fwl_status fwl_session_reset(fwl_session* session, const size_t* rows, size_t count,
                             fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.reset(rows, count);
  });
}

fwl_status fwl_session_fork(fwl_session* session, size_t source, const size_t* targets,
                            size_t count, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.fork(source, targets, count);
  });
}

fwl_status fwl_session_read_row(fwl_session* session, size_t row, void* state, size_t size,
                                fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.read_row(row, state, size);
  });
}

fwl_status fwl_session_write_row(fwl_session* session, size_t row, const void* state, size_t size,
                                 fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    session->session.write_row(row, state, size);
  });
}

fwl_status fwl_session_save_state(fwl_session* session, const char* path, const size_t* rows,
                                  size_t count, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    require(path, "path");
    session->session.save(path, rows, count);
  });
}

fwl_status fwl_session_load_state(fwl_session* session, const char* path, const size_t* rows,
                                  size_t count, fwl_error* error) {
  return guarded(error, [&] {
    require(session, "session");
    require(path, "path");
    session->session.load(path, rows, count);
  });
}

} // extern "C"
